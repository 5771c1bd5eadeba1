"""Two ways of computing the same, timed in turns."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

Way = Callable[[], object]


def medians(ways: Sequence[Way], repeats: int) -> list[float]:
    """Seconds of each way; all are run once before, which does not count."""
    times = [[_seconds(way) for way in ways] for _ in range(repeats + 1)][1:]
    return [median(column) for column in zip(*times, strict=True)]


def _seconds(way: Way) -> float:
    began = perf_counter()
    way()
    return perf_counter() - began
