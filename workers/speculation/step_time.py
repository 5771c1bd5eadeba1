"""How long a step of so many tokens takes, learned from the engine's own steps (SmartSpec, Liu et al. 2406.14066).

A line through all sizes is wrong where it matters, at one token: verification may be nearly free up to some size and
then grow in stairs. So there is a mean per bucket of sizes, and one linear term for the contexts that are read.
"""

from bisect import bisect_left
from dataclasses import dataclass

BUCKETS = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    12,
    16,
    20,
    24,
    32,
    40,
    48,
    64,
    80,
    96,
    128,
    192,
    256,
    384,
    512,
    1024,
    2048,
    4096,
    8192,
)
KEPT = 0.95  # of what a bucket knows, each time it learns: some twenty steps count
OUTLIER = 4.0  # a step that takes so many times the expected is a hiccup of the machine and teaches nothing


@dataclass
class _Bucket:
    """Sums over its steps, older ones weighing less: weight, tokens, context, seconds."""

    weight: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, context: int, seconds: float) -> None:
        for name, value in (("weight", 1.0), ("tokens", tokens), ("context", context), ("seconds", seconds)):
            setattr(self, name, getattr(self, name) * KEPT + value)


class StepTime:
    """Seconds of a step, by its tokens and by the positions that all its tokens' contexts have together."""

    def __init__(self) -> None:
        self._buckets = [_Bucket() for _ in (*BUCKETS, 0)]
        self._covariance = self._variance = 0.0  # of seconds and context, inside buckets

    @property
    def per_context(self) -> float:
        """Seconds per position that is read."""
        return max(0.0, self._covariance / self._variance) if self._variance > 0 else 0.0

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """A step has taken so long."""
        bucket = self._buckets[bisect_left(BUCKETS, tokens)]
        if bucket.weight > 3 and seconds > OUTLIER * self(tokens, context):
            return
        if bucket.weight:
            off = context - bucket.context / bucket.weight
            self._covariance = self._covariance * KEPT + off * (seconds - bucket.seconds / bucket.weight)
            self._variance = self._variance * KEPT + off * off
        bucket.add(tokens, context, seconds)

    def __call__(self, tokens: int, context: int = 0) -> float:
        """Expected seconds; between sizes that have been seen a line, beyond them in proportion. 0.0 while nothing is
        known."""
        slope = self.per_context
        seen = [bucket for bucket in self._buckets if bucket.weight]
        known = [(b.tokens / b.weight, max(0.0, (b.seconds - slope * b.context) / b.weight)) for b in seen]
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
        return base + slope * context

    def knows(self, tokens: int) -> bool:
        """Whether a step of this size has been seen."""
        return self._buckets[bisect_left(BUCKETS, tokens)].weight > 0
