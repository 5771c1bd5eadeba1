"""How long a step of so many tokens takes, learned from the engine's own steps (SmartSpec, Liu et al. 2406.14066).

A line through all sizes is wrong where it matters, at one token: verification may be nearly free up to some size and
then grow in stairs. So there is a median per bucket of sizes, and one linear term for the contexts that are read.
"""

from bisect import bisect_left
from collections import deque
from statistics import fmean, median
from typing import NamedTuple

BUCKETS = (*range(1, 33), 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
RECENT = 25  # steps that a bucket remembers; half of them may be hiccups of the machine
KEPT = 0.99  # of what is known of contexts, for each step
OUTLIER = 3.0  # a step that takes so many times the expected teaches nothing of contexts


class _Step(NamedTuple):
    tokens: int
    context: int
    seconds: float


class _Size(NamedTuple):
    """Of the steps that a bucket remembers: the mean of their tokens, the medians of contexts and seconds."""

    tokens: float
    context: float
    seconds: float


class StepTime:
    """Seconds of a step, by its tokens and by the positions that the contexts of its sequences have together."""

    def __init__(self) -> None:
        self._buckets = [deque[_Step](maxlen=RECENT) for _ in (*BUCKETS, 0)]
        self._sizes: dict[int, _Size] = {}  # by bucket
        self._known: list[_Size] = []  # the same in order
        self._covariance = self._variance = 0.0  # of seconds and context, inside buckets

    @property
    def per_context(self) -> float:
        """Seconds per position that is read."""
        return max(0.0, self._covariance / self._variance) if self._variance > 0 else 0.0

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """A step has taken so long."""
        which = bisect_left(BUCKETS, tokens)
        bucket, size = self._buckets[which], self._sizes.get(which)
        if size and len(bucket) > RECENT // 3 and seconds < OUTLIER * self(tokens, context):
            off = context - size.context
            self._covariance = self._covariance * KEPT + off * (seconds - size.seconds)
            self._variance = self._variance * KEPT + off * off
        bucket.append(_Step(tokens, context, seconds))
        counts, contexts, times = zip(*bucket, strict=True)
        self._sizes[which] = _Size(fmean(counts), median(contexts), median(times))
        self._known = [self._sizes[each] for each in sorted(self._sizes)]

    def __call__(self, tokens: int, context: int = 0) -> float:
        """Expected seconds; between sizes that have been seen a line, beyond them in proportion. 0.0 while nothing is
        known."""
        if not self._known:
            return 0.0
        place, slope = bisect_left(self._known, float(tokens), key=lambda size: size.tokens), self.per_context
        if place == 0:
            base = _alone(self._known[0], slope)
        elif place == len(self._known):
            base = _alone(self._known[-1], slope) * max(1.0, tokens / self._known[-1].tokens)
        else:
            low, high = self._known[place - 1], self._known[place]
            before, after = _alone(low, slope), _alone(high, slope)
            base = before + (after - before) * (tokens - low.tokens) / (high.tokens - low.tokens)
        return base + slope * context

    @property
    def largest(self) -> float:
        """Tokens of the largest steps that are known."""
        return self._known[-1].tokens if self._known else 0.0

    def knows(self, tokens: int) -> bool:
        """Whether a step of this size has been seen."""
        return bool(self._buckets[bisect_left(BUCKETS, tokens)])


def _alone(size: _Size, slope: float) -> float:
    """Seconds without contexts."""
    return max(0.0, size.seconds - slope * size.context)
