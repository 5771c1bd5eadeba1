"""Reduces and messages that come late: the latency of a link that this machine does not have. Emulated, and said so.

Waiting takes no CPU, and several may be late at once, as on a link with latency.
"""

import time
from typing import Any

import torch
from torch import Tensor

from stepladder.parallel.afd.wire import Wire
from stepladder.parallel.mesh import Group
from stepladder.parallel.residual import Pending

STAMP = 8  # bytes of a float64


class LateGroup(Group):
    """A CPU group. Every reduce is done `late` seconds after it really was."""

    late = 0.0

    def all_reduce(self, partial: Tensor) -> Pending:
        if not self.late:
            return super().all_reduce(partial)
        work = self._tensors.allreduce([partial])
        pending = _Late(work, partial, self.late)
        return self.meter.watch(pending, work, self.late) if self.meter.on else pending


class LateWire(Wire):
    """The rows in their own dtype behind the time of their sending; read `late` seconds after that at the earliest.

    Both ends of an edge read the time from one clock, that of their machine.
    """

    name = "late"
    late = 0.0

    def size(self, tokens: int, hidden: int, dtype: torch.dtype) -> int:
        return STAMP + super().size(tokens, hidden, dtype)

    def write(self, rows: Tensor, body: Tensor) -> None:
        body[:STAMP].view(torch.float64).fill_(time.perf_counter())
        super().write(rows, body[STAMP:])

    def read(self, body: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        due = body[:STAMP].view(torch.float64).item() + self.late
        time.sleep(max(0.0, due - time.perf_counter()))
        return super().read(body[STAMP:], hidden, dtype)


class _Late:
    def __init__(self, work: Any, tensor: Tensor, late: float) -> None:
        self.work, self._tensor, self._late = work, tensor, late
        self._landed = 0.0
        self._stamped = work.get_future().then(self._stamp)

    def wait(self) -> Tensor:
        self.work.wait()
        self._stamped.wait()
        time.sleep(max(0.0, self._landed + self._late - time.perf_counter()))
        return self._tensor

    def _stamp(self, future: Any) -> None:
        self._landed = time.perf_counter()
