"""What the controller knows of a group's load: how much of the last seconds was idle, and what waits now."""

from collections import deque
from typing import NamedTuple

from stepladder.parallel.clock import Split


class Reading(NamedTuple):
    """A group at its last sign of life.

    Attributes:
        clocks: of its ranks, since their loops began; none while it starts or has been lost.
        running, waiting: requests of its engine. steps: that this has run.
        serves: whether requests need it; the others are spare.
        beside: whether it shares a machine with a rank of the trainer.
        threads: that one of its ranks computes with.
    """

    clocks: tuple[Split, ...] = ()
    running: int = 0
    waiting: int = 0
    steps: int = 0
    serves: bool = True
    beside: bool = True
    threads: int = 1


class Load(NamedTuple):
    """Of a group. idle: the share of the last seconds in which its busiest rank had nothing to do; None: not known."""

    idle: float | None
    running: int
    waiting: int
    serves: bool


class Idleness:
    """One group's.

    Args:
        seconds: what is looked back on. Until half of them have passed in a life of the group, nothing is known.

    Attributes:
        steps: run between the last two readings. step_seconds: that rank 0 was busy with them. core_seconds: the same
            of all ranks, on all their threads.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._past: deque[tuple[float, Reading]] = deque()
        self.steps = self.step_seconds = self.core_seconds = 0.0

    def feed(self, now: float, reading: Reading) -> None:
        """Time does not go back."""
        if not self._goes_on(reading):
            self._past.clear()
        self.steps = self.step_seconds = self.core_seconds = 0.0
        if self._past:
            _, before = self._past[-1]
            busy = [late.busy - early.busy for early, late in zip(before.clocks, reading.clocks, strict=True)]
            self.steps, self.step_seconds = reading.steps - before.steps, busy[0]
            self.core_seconds = sum(busy) * reading.threads
        if reading.clocks:
            self._past.append((now, reading))
        while len(self._past) > 2 and self._past[1][0] <= now - self._seconds:
            self._past.popleft()

    @property
    def share(self) -> float | None:
        """See `Load.idle`."""
        if len(self._past) < 2:
            return None
        (_, first), (_, last) = self._past[0], self._past[-1]
        lived = [sum(late) - sum(early) for early, late in zip(first.clocks, last.clocks, strict=True)]
        if min(lived) < self._seconds / 2:
            return None
        idle = [late.idle - early.idle for early, late in zip(first.clocks, last.clocks, strict=True)]
        return min(part / whole for part, whole in zip(idle, lived, strict=True))

    def _goes_on(self, reading: Reading) -> bool:
        """Whether it is the same life of the same ranks: their counters only grow in it."""
        if not self._past:
            return True
        before = self._past[-1][1]
        if len(before.clocks) != len(reading.clocks) or reading.steps < before.steps:
            return False
        pairs = zip(before.clocks, reading.clocks, strict=True)
        return all(late >= early for pair in pairs for early, late in zip(*pair, strict=True))
