"""The residual stream alone: any legal lags, any parts."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepladder.parallel.residual import Block, Done, ResidualStream, immediate, run_blocks, together


class Late:
    """A contribution that notes when it was waited for."""

    def __init__(self, name: tuple[int, int], tensor: Tensor, waits: list[tuple[int, int]]) -> None:
        self.name, self.tensor, self.waits = name, tensor, waits

    def wait(self) -> Tensor:
        self.waits.append(self.name)
        return self.tensor


@st.composite
def lags_and_parts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(lag, number of parts) per block; the lag rises by at most 1 from one block to the next."""
    blocks, lag = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 12))):
        blocks.append((lag, draw(st.integers(1, 3))))
        lag = draw(st.integers(0, lag + 1))
    return blocks


@given(lags_and_parts(), st.integers(0, 2**32))
def test_any_lags_equal_a_direct_sum(blocks: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    values = [[torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(n)] for _, n in blocks]
    originals = [t.clone() for t in (x0, *(v for parts in values for v in parts))]
    waits: list[tuple[int, int]] = []
    seen: list[tuple[Tensor, Tensor]] = []
    stream, settled = ResidualStream(x0), 0

    def direct(count: int) -> Tensor:
        total = x0
        for parts in values[:count]:
            total = total + sum(parts[1:], parts[0])
        return total

    for index, (lag, _) in enumerate(blocks):
        x = stream.input(lag)
        settled = max(settled, index - lag)
        assert torch.equal(x, direct(max(0, index - lag)))
        assert waits == [(i, p) for i in range(settled) for p in range(len(values[i]))], "waited for more than it must"
        seen.append((x, x.clone()))
        stream.add(*(Late((index, p), t, waits) for p, t in enumerate(values[index])))
    assert torch.equal(stream.settle(), direct(len(blocks)))
    assert torch.equal(stream.settle(), direct(len(blocks))), "settling twice changes nothing"
    assert waits == [(i, p) for i in range(len(blocks)) for p in range(len(values[i]))], "each once, in order"
    for x, copy in seen:
        assert torch.equal(x, copy), "an earlier input was overwritten"
    for tensor, copy in zip((x0, *(v for parts in values for v in parts)), originals, strict=True):
        assert torch.equal(tensor, copy), "a contribution was overwritten"


@given(lags_and_parts())
def test_run_blocks_sums_each_block_once(blocks: list[tuple[int, int]]) -> None:
    """Modules of different constants: the result tells who was run, the inputs tell when."""
    inputs: list[list[float]] = []

    def module(value: float, index: int) -> Callable[[Tensor, str], Tensor]:
        def run(x: Tensor, context: str) -> Tensor:
            assert context == "step"
            inputs[index].append(float(x))
            return torch.tensor([[value]], dtype=torch.float64)

        return run

    inputs.extend([] for _ in blocks)
    made = [Block(lag, [module(2.0**i, i) for _ in range(n)]) for i, (lag, n) in enumerate(blocks)]
    total = run_blocks(made, [ResidualStream(torch.zeros(1, 1, dtype=torch.float64))], ["step"], together(Done))[0]
    assert float(total) == sum(n * 2.0**i for i, (_, n) in enumerate(blocks))
    for i, (lag, n) in enumerate(blocks):
        assert inputs[i] == [sum(blocks[j][1] * 2.0**j for j in range(max(0, i - lag)))] * n


def test_immediate_waits_at_once() -> None:
    waits: list[tuple[int, int]] = []
    reduce = immediate(lambda partial: Late((0, 0), partial, waits))
    pending = reduce(torch.ones(2))
    assert waits == [(0, 0)]
    assert torch.equal(pending.wait(), torch.ones(2)) and waits == [(0, 0)]
