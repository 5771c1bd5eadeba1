"""How long somebody has been silent, in seconds of ours: time in which we did not run ourselves does not count."""

from time import monotonic


class Silence:
    """Ask it at least every `tick` seconds. Between two questions at most twice that counts: whoever was stopped,
    starved or moved meanwhile has heard nothing for reasons of its own, and must not kill anybody for it.

    Args:
        tick: seconds.
    """

    def __init__(self, tick: float) -> None:
        self._most = 2 * tick
        self._seconds, self._asked = 0.0, monotonic()

    def broken(self) -> None:
        """There was a word."""
        self._seconds, self._asked = 0.0, monotonic()

    @property
    def seconds(self) -> float:
        """Since the last word."""
        now = monotonic()
        self._seconds += min(now - self._asked, self._most)
        self._asked = now
        return self._seconds
