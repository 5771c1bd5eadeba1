"""Time per layer of the two schedules, in the steady state."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds. attention, ffn: of one micro-batch in one layer; transfer: one way; reduce: the F ranks' own."""

    attention: float
    ffn: float
    transfer: float
    reduce: float = 0.0

    @property
    def round_trip(self) -> float:
        return self.attention + self.ffn + 2 * self.transfer


def per_layer(times: Times, lag: int, micro_batches: int) -> float:
    """Of all micro-batches together.

    Lag 0, ping-pong (MegaScale-Infer 2504.02263, eq. 3): the busier pool, or one micro-batch's way round. Lag 1, one
    micro-batch: either pool, or a third of the way round, since three layers' messages are on their way at once.
    """
    if lag == 0:
        return max(micro_batches * max(times.attention, times.ffn), times.round_trip)
    assert micro_batches == 1, "the formula is for one micro-batch"
    return max(times.attention, times.ffn + times.reduce, times.round_trip / 3)


def micro_batches(times: Times) -> int:
    """The fewest that keep the busier pool of a ping-pong busy: m >= 2 (1 + tC / max(tA, tF))."""
    busier = max(times.attention, times.ffn)
    return max(1, -int(-2 * (busier + times.transfer) // busier))
