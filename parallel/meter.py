"""How much of the all-reduces' time is hidden behind compute, from time stamps of real handles."""

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import Tensor

from stepladder.parallel.residual import Pending


@dataclass
class ReduceMeter:
    """Sums over the reduces issued while `on`.

    Attributes:
        total: seconds from issue to completion.
        exposed: seconds of those in which the host did nothing but wait, for this reduce or for an older one.
    """

    on: bool = False
    total: float = 0.0
    exposed: float = 0.0
    _stalls: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=8), repr=False)

    @property
    def hidden_share(self) -> float | None:
        """1 - exposed / total; None before anything was measured."""
        return 1 - self.exposed / self.total if self.total else None

    def watch(self, pending: Pending, work: Any, late: float = 0.0) -> Pending:
        """`pending`, stamped. Completion is stamped by the communication thread itself, `late` seconds are added."""
        return _Watched(self, pending, work, late)

    def count(self, issued: float, done: float, stall: tuple[float, float]) -> None:
        """A reduce, and the stall that waiting for it was."""
        self._stalls.append(stall)
        self.total += done - issued
        self.exposed += sum(max(0.0, min(done, end) - max(issued, begin)) for begin, end in self._stalls)


class _Watched:
    def __init__(self, meter: ReduceMeter, pending: Pending, work: Any, late: float) -> None:
        self.work, self._meter, self._pending, self._late = work, meter, pending, late
        self._issued = self._landed = perf_counter()
        self._stamped = work.get_future().then(self._stamp)
        self._metered = perf_counter()  # `then` takes 0.05 ms, in which nothing was computed

    def wait(self) -> Tensor:
        asked = perf_counter()
        tensor = self._pending.wait()
        self._stamped.wait()  # the callback may still be running when the reduce itself is over
        returned = perf_counter()
        issued = self._metered if self._landed > self._metered else self._issued
        done = min(max(self._landed, issued) + self._late, returned)
        self._meter.count(issued, done, (asked, returned))
        return tensor

    def _stamp(self, future: Any) -> None:
        self._landed = perf_counter()
