"""Two ways of computing the same, timed in turns."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, sleep

Way = Callable[[], object]
TURN_SECONDS = 0.1
ASLEEP_SECONDS = 0.015  # after so long without work, threads of torch and of our kernels no longer wait awake


def medians(ways: Sequence[Way], repeats: int) -> list[float]:
    """Seconds of each way; all are run once before, which does not count. Short ones have more turns than `repeats`."""
    times, began = [[_seconds(way) for way in ways]], perf_counter()
    while len(times) <= repeats or perf_counter() - began < repeats * TURN_SECONDS:
        times.append([_seconds(way) for way in ways])
    return [median(column) for column in zip(*times[1:], strict=True)]


def _seconds(way: Way) -> float:
    """Of the second call, for which its threads are awake, and those of the way before it are not."""
    sleep(ASLEEP_SECONDS)
    way()
    began = perf_counter()
    way()
    return perf_counter() - began
