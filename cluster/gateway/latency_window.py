"""Latencies since the last look, for a monitor that looks every few seconds."""

from collections import deque
from time import monotonic

MOST = 10_000  # samples kept of one interval


class LatencyWindow:
    """Collects since the last snapshot; the engine's and the client's clocks play no part.

    Attributes:
        tokens: generated. finished: requests that have ended.
        ttft, tpot: in seconds; a request with one token has no TPOT.
    """

    def __init__(self) -> None:
        self._clear()

    def snapshot(self) -> dict[str, float]:
        """Figures since the last snapshot. Percentiles of nothing are left out."""
        figures = {
            "serve/tokens_per_s": self.tokens / max(monotonic() - self._since, 1e-9),
            "serve/requests_finished": float(self.finished),
        }
        for name, samples in (("ttft", sorted(self.ttft)), ("tpot", sorted(self.tpot))):
            for percent in (50, 99) if samples else ():
                figures[f"serve/{name}_ms_p{percent}"] = 1000 * samples[(len(samples) - 1) * percent // 100]
        self._clear()
        return figures

    def _clear(self) -> None:
        self.ttft: deque[float] = deque(maxlen=MOST)
        self.tpot: deque[float] = deque(maxlen=MOST)
        self.tokens = self.finished = 0
        self._since = monotonic()
