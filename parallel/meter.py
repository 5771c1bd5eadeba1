"""How much of the all-reduces' time is hidden behind compute, from time stamps of real handles."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from parallel.residual import Pending


@dataclass
class ReduceMeter:
    """Sums over the reduces issued while `on`.

    Attributes:
        total: seconds from issue to completion.
        exposed: seconds of those in which the host did nothing but wait.
    """

    on: bool = False
    total: float = 0.0
    exposed: float = 0.0

    @property
    def hidden_share(self) -> float | None:
        """1 - exposed / total; None before anything was measured."""
        return 1 - self.exposed / self.total if self.total else None

    def watch(self, pending: Pending, work: Any) -> Pending:
        """`pending`, stamped. Completion is stamped by the communication thread itself."""
        return _Watched(self, pending, work)


class _Watched:
    def __init__(self, meter: ReduceMeter, pending: Pending, work: Any) -> None:
        self._meter, self._pending = meter, pending
        self._issued = self._done = perf_counter()
        self._future = work.get_future()
        self._future.add_done_callback(self._stamp)

    def wait(self) -> Tensor:
        asked = perf_counter()
        tensor = self._pending.wait()
        self._future.wait()
        done = max(self._done, self._issued)
        self._meter.total += done - self._issued
        self._meter.exposed += max(0.0, done - asked)
        return tensor

    def _stamp(self, future: Any) -> None:
        self._done = perf_counter()
