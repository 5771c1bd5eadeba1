"""How long a step of so many tokens takes, learned from the engine's own steps (SmartSpec, Liu et al. 2406.14066).

A line through all sizes is wrong where it matters, at one token: verification may be nearly free up to some size and
then grow in stairs. So there is a median per bucket of sizes, and one linear term for the contexts that are read.
"""

from bisect import bisect_left
from collections import deque
from statistics import median
from typing import NamedTuple

BUCKETS = (*range(1, 33), 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
RECENT = 25  # steps that a bucket remembers; half of them may be hiccups of the machine
KEPT = 0.99  # of what is known of contexts, for each step
OUTLIER = 3.0  # a step that takes so many times the expected teaches nothing of contexts


class _Step(NamedTuple):
    tokens: int
    context: int
    seconds: float


class StepTime:
    """Seconds of a step, by its tokens and by the positions that the contexts of its sequences have together."""

    def __init__(self) -> None:
        self._buckets = [deque[_Step](maxlen=RECENT) for _ in (*BUCKETS, 0)]
        self._known: list[tuple[float, float]] | None = None  # (tokens, seconds without contexts) by size
        self._covariance = self._variance = 0.0  # of seconds and context, inside buckets

    @property
    def per_context(self) -> float:
        """Seconds per position that is read."""
        return max(0.0, self._covariance / self._variance) if self._variance > 0 else 0.0

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """A step has taken so long."""
        bucket = self._buckets[bisect_left(BUCKETS, tokens)]
        if len(bucket) > RECENT // 3 and seconds < OUTLIER * self(tokens, context):
            off = context - median(step.context for step in bucket)
            self._covariance = self._covariance * KEPT + off * (seconds - median(step.seconds for step in bucket))
            self._variance = self._variance * KEPT + off * off
        bucket.append(_Step(tokens, context, seconds))
        self._known = None

    def __call__(self, tokens: int, context: int = 0) -> float:
        """Expected seconds; between sizes that have been seen a line, beyond them in proportion. 0.0 while nothing is
        known."""
        known = self._known = self._known or self._sizes()
        if not known:
            return 0.0
        place = bisect_left(known, (tokens, 0.0))
        if place == 0:
            base = known[0][1]
        elif place == len(known):
            base = known[-1][1] * max(1.0, tokens / known[-1][0])
        else:
            (low, before), (high, after) = known[place - 1], known[place]
            base = before + (after - before) * (tokens - low) / (high - low)
        return base + self.per_context * context

    def knows(self, tokens: int) -> bool:
        """Whether a step of this size has been seen."""
        return bool(self._buckets[bisect_left(BUCKETS, tokens)])

    def _sizes(self) -> list[tuple[float, float]]:
        slope, found = self.per_context, []
        for bucket in self._buckets:
            if bucket:
                alone = max(0.0, median(step.seconds - slope * step.context for step in bucket))
                found.append((sum(step.tokens for step in bucket) / len(bucket), alone))
        return found
