"""Native draws from logits against the sampler's own definition."""

import pytest
import torch
from torch import Tensor

from stepladder.kernels.cpu.sampling import Sampled, sample
from stepladder.workers.core import Sample, SamplingParams
from stepladder.workers.sampler import sample_among

ROWS = 40


def told(logits: Tensor, tokens: Tensor | None, temperatures: list[float]) -> Sampled:
    rows = range(len(logits))
    seeds, positions = [7 * row - (1 << 40) for row in rows], [row + 5 for row in rows]
    return sample(logits, tokens, temperatures, seeds, positions, shares=True)


@pytest.mark.parametrize("size", [1, 5, 60, 4099])
@pytest.mark.parametrize("some", [False, True])
def test_it_draws_what_the_sampler_draws(size: int, some: bool) -> None:
    g = torch.Generator().manual_seed(size)
    logits = 4 * torch.randn(ROWS, size, generator=g)
    tokens = torch.randperm(50_000, generator=g)[:size].sort().values if some else torch.arange(size)
    temperatures = [(0.0, 0.3, 1.0, 1e-30)[row % 4] for row in range(ROWS)]
    columns, most, clear = told(logits, tokens if some else None, temperatures)
    samples = [
        Sample(row, row + 5, SamplingParams(temperature=t, seed=7 * row - (1 << 40)), [], 0)
        for row, t in enumerate(temperatures)
    ]
    known = columns >= 0
    assert clear == bool(known.all()) and known.float().mean() > 0.9
    for native in (False, True):
        assert torch.equal(tokens[columns][known], sample_among(logits, samples, tokens, native)[0][known])
    torch.testing.assert_close(most, logits.softmax(-1).amax(-1), rtol=2e-6, atol=0)


def test_what_is_no_number_is_not_drawn() -> None:
    logits, tokens = torch.zeros(5, 33), torch.arange(33) + 10
    logits[1, 32] = logits[3, 2] = float("nan")
    logits[4] = float("-inf")
    columns, most, clear = told(logits, tokens, [0.0, 0.0, 0.0, 1.0, 1.0])
    assert columns.tolist() == [0, -1, 0, -1, -1] and not clear, "the first of equals"
    assert most[:4].tolist() == pytest.approx([1 / 33, 0.0, 1 / 33, 0.0])
    samples = [Sample(row, 5, SamplingParams(temperature=row / 4), [], 0) for row in range(5)]
    plain, native = (sample_among(logits, samples, tokens, native)[0] for native in (False, True))
    assert torch.equal(plain, native)
