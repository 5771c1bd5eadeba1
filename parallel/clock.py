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
        self._spent = [0.0, 0.0, 0.0]
        self._mark: tuple[int, float] | None = BUSY, self._now()

    def split(self) -> Split:
        """Up to now, the state that still lasts included."""
        while True:
            mark, spent = self._mark, [*self._spent]
            if mark and mark is self._mark:  # nobody has switched meanwhile, or is about to
                spent[mark[0]] += self._now() - mark[1]
                return Split(*spent)

    def switch(self, state: int) -> int:
        """From now on in `state`; returns the one before."""
        assert self._mark
        before, since = self._mark
        self._mark, now = None, self._now()
        self._spent[before] += now - since
        self._mark = state, now
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
