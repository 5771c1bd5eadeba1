"""A group whose reduces come late: the latency of a link that this machine does not have. Emulated, and said so."""

import time
from typing import Any

from torch import Tensor

from stepladder.parallel.mesh import Group
from stepladder.parallel.residual import Pending


class LateGroup(Group):
    """A CPU group. Every reduce is done `late` seconds after it really was; several may be late at once, as on a link
    with latency. The waiting takes no CPU."""

    late = 0.0

    def all_reduce(self, partial: Tensor) -> Pending:
        if not self.late:
            return super().all_reduce(partial)
        work = self._tensors.allreduce([partial])
        pending = _Late(work, partial, self.late)
        return self.meter.watch(pending, work, self.late) if self.meter.on else pending


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
