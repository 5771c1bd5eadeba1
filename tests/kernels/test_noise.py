"""The noise is Gumbel, independent from key to key, and a function of the key alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stepladder.kernels.cpu import sampling
from stepladder.kernels.cpu.build import why_not
from stepladder.kernels.host_noise import gumbel_of
from stepladder.kernels.noise import _mix, draw, gumbel

RARE = 1e-4  # the keys are fixed, so these tests cannot flicker; a good generator stays far above this


def seeds_of_one_lane(count: int) -> torch.Tensor:
    """Seeds made to share the first 32 bits of their key: high = c ^ mix(low)."""
    low = torch.arange(count)
    return (((0x1234567 ^ _mix(low)) << 32) | low).to(torch.int64)


KEYS = {
    "positions of one seed": (torch.zeros(400, dtype=torch.int64), torch.arange(400)),
    "small seeds": (torch.arange(400), torch.full((400,), 17)),
    "negative seeds": (-torch.arange(400) - 1, torch.full((400,), 17)),
    "seeds that differ above 32 bits": (torch.arange(400) << 32, torch.full((400,), 17)),
    "seed and position together": (torch.arange(400), torch.arange(400)),
    "seeds that share half their key": (seeds_of_one_lane(400), torch.full((400,), 17)),
}


@pytest.mark.parametrize("keys", KEYS)
def test_distribution(keys: str) -> None:
    noise = gumbel(*KEYS[keys], 500)
    assert noise.shape == (400, 500) and noise.dtype == torch.float32 and noise.isfinite().all()
    values = noise.flatten().numpy()
    assert stats.kstest(values, "gumbel_r").pvalue > RARE
    assert stats.kstest(np.exp(-np.exp(-values.astype(np.float64))), "uniform").pvalue > RARE
    for row in (noise[0], noise[-1], noise[:, 0], noise[:, -1]):
        assert stats.kstest(row.numpy(), "gumbel_r").pvalue > RARE


@pytest.mark.parametrize("keys", KEYS)
def test_keys_are_independent(keys: str) -> None:
    """Correlations of neighbouring keys, of far keys and of neighbouring tokens are those of independent draws."""
    u = torch.exp(-torch.exp(-gumbel(*KEYS[keys], 500).double())) - 0.5
    pairs = [(u[:-1], u[1:]), (u[:-64], u[64:]), (u[:, :-1], u[:, 1:]), (u[:-1, :-1], u[1:, 1:])]
    pairs += [((u[:-1] > 0.4).double(), (u[1:] > 0.4).double())]  # the tails decide which token wins
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(float(correlation)) < 4.5 / a.numel() ** 0.5
    between_rows = torch.corrcoef(u).fill_diagonal_(0).abs()
    assert float(between_rows.max()) < 6.5 / 500**0.5
    assert float(torch.corrcoef(u.T).fill_diagonal_(0).abs().max()) < 6.5 / 400**0.5


def test_keys_do_not_repeat() -> None:
    """Neither within a request nor between requests."""
    seeds, positions = torch.meshgrid(torch.arange(-512, 512), torch.arange(128), indexing="ij")
    noise = gumbel(seeds.flatten(), positions.flatten(), 8)
    assert len(torch.unique(noise, dim=0)) == 1024 * 128
    halved = gumbel(seeds_of_one_lane(2048), torch.full((2048,), 17), 8)
    assert len(torch.unique(halved, dim=0)) == 2048, "half a key is not a key"


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20)), min_size=1, max_size=6))
def test_a_key_has_the_same_noise_in_every_batch(keys: list[tuple[int, int]]) -> None:
    seeds, positions = torch.tensor(keys, dtype=torch.int64).T
    batch = gumbel(seeds, positions, 50)
    for row, (seed, position) in enumerate(keys):
        alone = gumbel(torch.tensor([seed]), torch.tensor([position]), 50)[0]
        assert torch.equal(batch[row], alone)
        assert torch.equal(gumbel(seeds, positions, 80)[row, :50], alone), "depends on the size of the vocabulary"


@pytest.mark.skipif(why_not() is not None, reason="there are no native kernels here")
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 49153])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_native_kernels_draw_the_same(size: int, spread: float) -> None:
    """Whether a vocabulary is flat or steep, whole or truncated, all of it or some tokens of it."""
    dice = torch.Generator().manual_seed(size)
    for truncated, some in ((False, False), (True, False), (False, True), (True, True)):
        scores = torch.randn(9, size, generator=dice) * spread
        scores -= scores.amax(-1, keepdim=True)
        if truncated:
            scores[torch.rand(9, size, generator=dice) > 0.2] = float("-inf")
            scores[:, size // 2] = 0.0
        seeds = torch.randint(-(2**62), 2**62, (9,), generator=dice)
        positions = torch.randint(0, 10**6, (9,), generator=dice)
        tokens = torch.randperm(2 * size, generator=dice)[:size] if some else None
        expected = draw(scores, seeds, positions, tokens)
        assert torch.equal(draw(scores, seeds, positions, tokens, native=True), expected)
        assert (sampling.draw(scores, tokens, seeds, positions)[0] >= 0).float().mean() > 0.6, "it is clear mostly"
        for row in range(9):
            assert (
                draw(scores[row : row + 1], seeds[row : row + 1], positions[row : row + 1], tokens, True)
                == expected[row]
            )


@pytest.mark.skipif(why_not() is not None, reason="there are no native kernels here")
def test_what_is_no_number_is_drawn_as_without_native_kernels() -> None:
    scores, seeds, positions = torch.zeros(3, 40), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    scores[1, 33] = float("nan")
    scores[2] = float("-inf")
    assert torch.equal(draw(scores, seeds, positions, native=True), draw(scores, seeds, positions))
    assert torch.equal(
        draw(scores[2:], seeds[2:], positions[2:], native=True), draw(scores[2:], seeds[2:], positions[2:])
    )


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20), st.lists(st.integers(0, 2**18), min_size=1, max_size=5))
def test_the_noise_of_a_few_tokens_is_the_same_on_the_host(seed: int, position: int, tokens: list[int]) -> None:
    expected = gumbel(torch.tensor([seed]), torch.tensor([position]), torch.tensor(tokens))[0]
    assert gumbel_of(seed, position, tokens) == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)
