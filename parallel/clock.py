"""One rank's life split into busy, waiting for peers, and idle: what leases and figures are made from."""

from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

BUSY, WAITING, IDLE = range(3)


class Split(NamedTuple):
    """Seconds since the rank's loop began."""

    busy: float = 0.0
    waiting: float = 0.0
    idle: float = 0.0

    @property
    def whole(self) -> float:
        return self.busy + self.waiting + self.idle


class Clock:
    """Busy, unless the loop says otherwise: `with clock.waiting: ...`, `with clock.idle: ...`; these may be nested.

    Written by one thread, read by any. On CUDA this is the host's time: waiting for its own device is busy.

    Args:
        now: the time, in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self.waiting, self.idle = _State(self, WAITING), _State(self, IDLE)
        self.restart()

    def restart(self) -> None:
        """Begin anew: whatever was before the loop, such as loading, is forgotten."""
        self._mark = BUSY, self._now(), Split()

    def split(self) -> Split:
        """Up to now, the state that still lasts included."""
        state, since, spent = self._mark  # one tuple, replaced as a whole, so that no reader sees half of it
        return _add(spent, state, self._now() - since)

    def switch(self, state: int) -> int:
        """From now on in `state`; returns the one before."""
        before, since, spent = self._mark
        now = self._now()
        self._mark = state, now, _add(spent, before, now - since)
        return before


class _State:
    """A context manager that can be entered again inside itself; cheap enough for every all-reduce."""

    def __init__(self, clock: Clock, state: int) -> None:
        self._clock, self._state = clock, state
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._before.append(self._clock.switch(self._state))

    def __exit__(self, *_: object) -> None:
        self._clock.switch(self._before.pop())


def _add(spent: Split, state: int, seconds: float) -> Split:
    busy, waiting, idle = spent
    if state == BUSY:
        return Split(busy + seconds, waiting, idle)
    return Split(busy, waiting + seconds, idle) if state == WAITING else Split(busy, waiting, idle + seconds)
