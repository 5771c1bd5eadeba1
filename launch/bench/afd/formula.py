"""Time per layer of the two schedules in the steady state, and of a whole pipeline with its filling and draining."""

from dataclasses import dataclass
from math import ceil


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
    seconds, free, arrived = (times.attention, times.ffn), [0.0, 0.0], [0.0, 0.0]
    here: list[list[list[float]]] = [
        [[0.0] for _ in range(micro_batches)] for _ in range(2)
    ]  # [pool][micro], x_0 first

    def send(pool: int, micro: int, end: float) -> None:
        arrived[pool] = max(end + times.transfer, arrived[pool] + times.spacing)
        here[1 - pool][micro].append(arrived[pool])

    here[1] = [[times.transfer + micro * times.spacing] for micro in range(micro_batches)]
    free[1] = arrived[0] = here[1][-1][0]  # the F rank begins when it has x_0 of every micro-batch
    for block in range(2 * layers):
        pool = block % 2
        for micro in range(micro_batches):
            needed = max(here[pool][micro][: 1 + max(0, block - lag)])
            free[pool] = max(free[pool], needed) + seconds[pool]
            here[pool][micro].append(free[pool] + (times.reduce if pool else 0.0))
            send(pool, micro, free[pool])
    return max(max(contributions) for contributions in here[0])


def micro_batches(times: Times) -> int:
    """Enough to keep the busier pool of a ping-pong busy: m >= 2 (1 + tC / max(tA, tF)), MegaScale-Infer's rule.

    The fewest only where tA = tF; a pool that is faster leaves time, and (tA + tF + 2 tC) / max(tA, tF) would do.
    """
    needed = 2 * (1 + times.transfer / max(times.attention, times.ffn))
    return ceil(round(needed, 9))  # a whole number may have come out a little above itself
