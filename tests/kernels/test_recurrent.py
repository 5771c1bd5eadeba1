"""The native cell of a recurrent drafter, and its draws, against their definitions."""

import pytest
import torch
from torch import Tensor

from stepladder.kernels.cpu.recurrent import RecurrentCell, foresee
from stepladder.workers.core import Sample, SamplingParams
from stepladder.workers.sampler import sample_among
from tests.kernels.native_checks import DTYPES, close, wide


def random_cell(hidden: int, inner: int, dtype: torch.dtype) -> RecurrentCell:
    g = torch.Generator().manual_seed(hidden)
    shapes = (inner, 2 * hidden), (inner, 2 * hidden), (hidden, 2 * hidden), (hidden, inner)
    return RecurrentCell.of(*((torch.randn(shape, generator=g) * shape[1] ** -0.5).to(dtype) for shape in shapes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner", "rows"), [(32, 24, 1), (37, 41, 3), (256, 512, 9)])
def test_the_cell_is_its_definition(hidden: int, inner: int, rows: int, dtype: torch.dtype) -> None:
    cell, g = random_cell(hidden, inner, dtype), torch.Generator().manual_seed(rows)
    state, embedded = 3 * torch.randn(rows, hidden, generator=g), torch.randn(rows, hidden, generator=g)
    exact = RecurrentCell(wide(cell.gated), wide(cell.out))
    eps = torch.finfo(torch.float32).eps
    both = [x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() for x in (state, embedded)]
    x = torch.cat(both, -1)
    want = exact.out.defined(torch.cat((exact.gated.defined(x), x), -1))
    close(cell(state, embedded), want, 4e-6, least=1.0)
    close(cell.defined(state, embedded), want, 1e-5 if dtype == torch.float32 else 2e-2, least=1.0)
    for row in range(rows):
        alone = cell(state[row : row + 1], embedded[row : row + 1])
        assert torch.equal(alone[0], cell(state, embedded)[row]), "a row's bits are its own"


def told(logits: Tensor, tokens: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor, bool]:
    rows = range(len(logits))
    return foresee(logits, tokens, temperatures, [7 * row - (1 << 40) for row in rows], [row + 5 for row in rows])


@pytest.mark.parametrize("size", [1, 5, 60, 4099])
def test_it_draws_what_the_sampler_draws(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    logits, tokens = 4 * torch.randn(40, size, generator=g), torch.randperm(50_000, generator=g)[:size].sort().values
    temperatures = [(0.0, 0.3, 1.0, 1.7)[row % 4] for row in range(40)]
    drawn, most, clear = told(logits, tokens, temperatures)
    samples = [
        Sample(row, row + 5, SamplingParams(temperature=t, seed=7 * row - (1 << 40)), [], 0)
        for row, t in enumerate(temperatures)
    ]
    want = sample_among(logits, samples, tokens)
    assert clear == bool((drawn >= 0).all()) and (drawn >= 0).float().mean() > 0.9
    assert torch.equal(drawn[drawn >= 0], want[drawn >= 0])
    torch.testing.assert_close(most, logits.softmax(-1).amax(-1), rtol=2e-6, atol=0)


def test_what_is_no_number_is_not_drawn() -> None:
    logits, tokens = torch.zeros(4, 33), torch.arange(33) + 10
    logits[1, 32] = logits[3, 2] = float("nan")
    drawn, most, clear = told(logits, tokens, [0.0, 0.0, 0.0, 1.0])
    assert drawn.tolist() == [10, -1, 10, -1] and not clear, "the first of equals"
    assert most.tolist() == pytest.approx([1 / 33, 0.0, 1 / 33, 0.0])
