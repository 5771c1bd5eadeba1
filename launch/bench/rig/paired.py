"""The ratio of two things that were measured in turns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Ratio(NamedTuple):
    """The median of the paired ratios, and a 95% interval of that median."""

    median: float
    low: float
    high: float


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of pairs from the same round; the interval is the percentile bootstrap (Efron & Tibshirani 1993, §13.3)."""
    ratios = np.asarray(numerators) / np.asarray(denominators)
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
