"""The paired bootstrap: its interval covers what is true, pairs cancel, and nothing passes that is not better."""

import math

import pytest
import torch

from stepladder.workers.speculation.learning.gate import Verdict, paired_bootstrap


def scores(requests: int, better: float, seed: int, noise: float = 0.1) -> tuple[list[float], list[float]]:
    """Requests differ far more than the two drafters do."""
    dice = torch.Generator().manual_seed(seed)
    hard = torch.randn(requests, generator=dice, dtype=torch.float64)
    old, new = (hard + noise * torch.randn(requests, generator=dice, dtype=torch.float64) for _ in range(2))
    return (new + better).tolist(), old.tolist()


def test_the_interval_is_that_of_the_mean_difference() -> None:
    """For many requests: mean -+ 1.96 standard errors."""
    new, old = scores(400, 0.05, 0)
    differences = torch.tensor(new, dtype=torch.float64) - torch.tensor(old, dtype=torch.float64)
    found, error = paired_bootstrap(new, old, seed=1, rounds=20_000), float(differences.std()) / math.sqrt(400)
    assert found.difference == pytest.approx(float(differences.mean()))
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)
    assert paired_bootstrap(new, old, seed=1, rounds=20_000) == found


def test_pairs_cancel_what_makes_requests_hard() -> None:
    """The requests spread by 1, which would hide 0.05 in 100 of them."""
    assert paired_bootstrap(*scores(100, 0.05, 2), seed=0).passes(0.0)
    assert not paired_bootstrap(*scores(100, 0.05, 2), seed=0).passes(0.06)


def test_what_is_no_better_hardly_ever_passes() -> None:
    """2.5 % on average; 200 comparisons with fixed seeds."""
    passed = sum(paired_bootstrap(*scores(40, 0.0, seed), seed=seed, rounds=500).passes(0.0) for seed in range(200))
    assert passed <= 14
    assert not any(paired_bootstrap(*scores(40, -0.1, seed), seed=0, rounds=500).passes(0.0) for seed in range(50))


def test_few_requests_and_strange_figures_pass_nothing() -> None:
    assert paired_bootstrap([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], seed=0) == Verdict(2.0, -math.inf, math.inf)
    assert paired_bootstrap([], [], seed=0) == Verdict(0.0, -math.inf, math.inf)
    assert paired_bootstrap([1.0] * 4, [0.5] * 4, seed=0) == Verdict(0.5, 0.5, 0.5)
    assert not paired_bootstrap([1.0] * 9 + [math.nan], [0.0] * 10, seed=0).passes(0.0)
    with pytest.raises(ValueError, match="there are 2 new and 1 old"):
        paired_bootstrap([1.0, 2.0], [1.0], seed=0)
