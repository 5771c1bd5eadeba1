"""Latencies since the last look, for a monitor that looks every few seconds."""

from collections import deque
from time import monotonic

MOST = 10_000  # samples kept of one interval


class LatencyWindow:
    """Collects since the last snapshot; the engine's and the client's clocks play no part."""

    def __init__(self) -> None:
        self._clear()

    def token(self, count: int) -> None:
        self._tokens += count

    def first_token(self, seconds: float) -> None:
        self._ttft.append(seconds)

    def finished(self, seconds_per_token: float | None) -> None:
        """A request has ended; its TPOT, if it had more than one token."""
        self._finished += 1
        if seconds_per_token is not None:
            self._tpot.append(seconds_per_token)

    def snapshot(self) -> dict[str, float]:
        """Figures since the last snapshot. Percentiles of nothing are left out."""
        figures = {
            "serve/tokens_per_s": self._tokens / max(monotonic() - self._since, 1e-9),
            "serve/requests_finished": float(self._finished),
        }
        for name, samples in (("ttft", sorted(self._ttft)), ("tpot", sorted(self._tpot))):
            for percent in (50, 99) if samples else ():
                figures[f"serve/{name}_ms_p{percent}"] = 1000 * samples[(len(samples) - 1) * percent // 100]
        self._clear()
        return figures

    def _clear(self) -> None:
        self._ttft: deque[float] = deque(maxlen=MOST)
        self._tpot: deque[float] = deque(maxlen=MOST)
        self._tokens = self._finished = 0
        self._since = monotonic()
