"""Time per layer of the two schedules in the steady state, and of a whole pipeline with its filling and draining."""

from dataclasses import dataclass
from math import ceil

from stepladder.parallel.wiring import ATTENTION, FFN, SEATS


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds. attention, ffn: of one micro-batch in one layer; transfer: one way; reduce: the F ranks' own; spacing:
    from one message's arrival to the next one's if both were sent together, 0 on a link that is only slow to answer."""

    attention: float
    ffn: float
    transfer: float
    reduce: float = 0.0
    spacing: float = 0.0

    @property
    def round_trip(self) -> float:
        return self.attention + self.ffn + 2 * self.transfer


def per_layer(times: Times, lag: int, micro_batches: int) -> float:
    """Of all micro-batches together.

    Lag 0, ping-pong (MegaScale-Infer 2504.02263, eq. 3): the busier pool, or one micro-batch's way round. Lag 1, one
    micro-batch: either pool, or a third of the way round, since three layers' messages are on their way at once.
    Neither is faster than a link that is narrow.
    """
    if lag == 0:
        return max(micro_batches * max(times.attention, times.ffn, times.spacing), times.round_trip)
    assert micro_batches == 1, "the formula is for one micro-batch"
    return max(times.attention, times.ffn + times.reduce, times.spacing, times.round_trip / 3)


def pipeline(times: Times, lag: int, micro_batches: int, layers: int) -> float:
    """Of all layers, from x_0 on the A rank to the last contribution there: nothing waits but for what it needs.

    A block begins when its pool is free and has every contribution but the `lag` newest; the other pool has it
    `transfer` later. Per layer more it grows by `per_layer`.
    """
    seconds, other = {ATTENTION: times.attention, FFN: times.ffn}, {ATTENTION: FFN, FFN: ATTENTION}
    sent = [times.transfer + micro * times.spacing for micro in range(micro_batches)]
    here = {ATTENTION: [[0.0] for _ in sent], FFN: [[x] for x in sent]}  # [pool][micro], x_0 first
    arrived = {ATTENTION: sent[-1], FFN: 0.0}  # what each has sent
    free = {ATTENTION: 0.0, FFN: sent[-1]}  # the F rank begins when it has x_0 of every micro-batch
    for block, pool in enumerate(SEATS * layers):
        for micro in range(micro_batches):
            needed = max(here[pool][micro][: 1 + max(0, block - lag)])
            free[pool] = max(free[pool], needed) + seconds[pool]
            here[pool][micro].append(free[pool] + (times.reduce if pool == FFN else 0.0))
            arrived[pool] = max(free[pool] + times.transfer, arrived[pool] + times.spacing)
            here[other[pool]][micro].append(arrived[pool])
    return max(max(contributions) for contributions in here[ATTENTION])


def micro_batches(times: Times) -> int:
    """Enough to keep the busier pool of a ping-pong busy: m >= 2 (1 + tC / max(tA, tF)), MegaScale-Infer's rule.

    The fewest only where tA = tF; a pool that is faster leaves time, and (tA + tF + 2 tC) / max(tA, tF) would do.
    """
    needed = 2 * (1 + times.transfer / max(times.attention, times.ffn))
    return ceil(round(needed, 9))  # a whole number may have come out a little above itself
