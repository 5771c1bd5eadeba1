"""What the turns come to."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from stepladder.launch.bench.rig.paired import RESAMPLES, paired_ratio
from stepladder.launch.bench.speculate.turns import Served, Side
from stepladder.launch.bench.speculate.watched import Compared, Watched
from stepladder.workers.speculation.step_time import BUCKETS

FEW = 20  # held-out steps of a size that say too little


class Gain(NamedTuple):
    """Tokens per second over another side's, of all turns, with a 95% interval; and the median of the turns' ratios."""

    value: float
    low: float
    high: float
    median: float


def gain(side: Sequence[Served], other: Sequence[Served]) -> Gain:
    """The interval is the percentile bootstrap over turns."""
    pairs = np.array([(s.tokens, s.seconds, o.tokens, o.seconds) for s, o in zip(side, other, strict=True)])
    chosen = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.percentile(_over(pairs[chosen].sum(1)), [2.5, 97.5])
    rates = [[one.tokens / one.seconds for one in served] for served in (side, other)]
    return Gain(float(_over(pairs.sum(0))), float(low), float(high), paired_ratio(*rates).median)


def _over(sums: Any) -> Any:
    tokens, seconds, other_tokens, other_seconds = np.moveaxis(sums, -1, 0)
    return tokens / seconds / (other_tokens / other_seconds)


@dataclass(frozen=True)
class Figures:
    """Of one side. per_token: p50 and p99 of a request's seconds per token, in ms. The others are None of plain
    decoding: accepted, of the drafted tokens that were reached, by place; length, tokens that a step with a draft went
    on with; draft_ms, what drafting takes before a step; share, of the time; predicted, of the gain."""

    per_second: float
    per_token: tuple[float, float]
    accepted: list[float] | None = None
    length: float | None = None
    draft_ms: float | None = None
    share: float | None = None
    predicted: float | None = None

    @classmethod
    def of(cls, side: Side) -> "Figures":
        seconds = sum(one.seconds for one in side.served)
        rates = [rate * 1e3 for one in side.served for rate in one.per_token] or [0.0]
        per_token = float(np.percentile(rates, 50)), float(np.percentile(rates, 99))
        per_second = sum(one.tokens for one in side.served) / seconds
        if side.speculator is None:
            return cls(per_second, per_token)
        watch = side.speculator.watch
        return cls(
            per_second,
            per_token,
            [right / reached for right, reached in zip(watch.accepted, watch.reached, strict=True)],
            1 + sum(watch.accepted) / watch.drafts if watch.drafts else None,
            1e3 * watch.draft_seconds / watch.drafting_steps if watch.drafting_steps else None,
            watch.draft_seconds / seconds,
            side.speculator.predicted_gain(),
        )


def differing(side: Sequence[Served], other: Sequence[Served]) -> int:
    """How many texts are not the same."""
    return sum(a != b for one, two in zip(side, other, strict=True) for a, b in zip(one.texts, two.texts, strict=True))


class StepError(NamedTuple):
    """Of held-out steps of one size: predicted over measured, of all together; and each one's own error, in %."""

    steps: int
    ratio: float
    error: float


def step_errors(speculators: Iterable[Watched]) -> dict[str, StepError]:
    """By size, smallest first."""
    found: defaultdict[int, list[Compared]] = defaultdict(list)
    for speculator in speculators:
        for one in speculator.held_out.compared:
            found[one.bucket].append(one)
    return {_size(bucket): _error(found[bucket]) for bucket in sorted(found)}


def _error(steps: Sequence[Compared]) -> StepError:
    ratio = sum(one.expected for one in steps) / sum(one.seconds for one in steps)
    return StepError(len(steps), ratio, 100 * fmean(abs(one.expected / one.seconds - 1) for one in steps))


def _size(bucket: int) -> str:
    """Of a bucket, in words."""
    if bucket == len(BUCKETS):
        return f"over {BUCKETS[-1]} tokens"
    least, most = (BUCKETS[bucket - 1] if bucket else 0) + 1, BUCKETS[bucket]
    return f"{least} to {most} tokens" if least < most else f"{most} token{'s' * (most > 1)}"
