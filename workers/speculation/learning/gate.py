"""Whether a candidate is better than what is live: a paired bootstrap over held-out requests."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

__all__ = ["FEWEST", "Verdict", "paired_bootstrap"]

FEWEST = 4  # requests that an interval can be taken from
TAIL = 0.025
CHUNK = 1 << 22  # numbers that are drawn at once


class Verdict(NamedTuple):
    """By how much the new one is better in the mean of all requests, and the bounds of the 95 % interval of that."""

    difference: float
    low: float
    high: float

    def passes(self, margin: float) -> bool:
        """Whether it is better by more than `margin`, beyond doubt. Figures that are no numbers pass nothing."""
        return self.low > margin


def paired_bootstrap(new: Seq[float], old: Seq[float], seed: int, rounds: int = 2000) -> Verdict:
    """Requests are drawn again with replacement, each with both of its scores, so that how hard a request is cancels
    (Efron 1979; the percentile interval). With fewer than `FEWEST` requests nothing is known: the interval is infinite.

    Args:
        new, old: a score per request, higher is better, in the same order.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    if len(new) != len(old):
        raise ValueError(f"a gate compares scores of the same requests; there are {len(new)} new and {len(old)} old")
    differences = torch.tensor(new, dtype=torch.float64) - torch.tensor(old, dtype=torch.float64)
    mean = float(differences.mean()) if len(differences) else 0.0
    if len(differences) < FEWEST:
        return Verdict(mean, float("-inf"), float("inf"))
    dice, means = torch.Generator().manual_seed(seed), list[torch.Tensor]()
    for part in torch.arange(rounds).split(max(1, CHUNK // len(differences))):
        drawn = torch.randint(len(differences), (len(part), len(differences)), generator=dice)
        means.append(differences[drawn].mean(-1))
    low, high = torch.cat(means).quantile(torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)).tolist()
    return Verdict(mean, low, high)
