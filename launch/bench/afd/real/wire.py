"""An edge whose messages come late and can be watched: the latency of a link that this machine does not have.

Emulated, and said so. Messages carry the time at which they were sent, which both ranks read from one clock; a receiver
that would have a message before it is due waits, without taking CPU.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from stepladder.launch.bench.afd.real.task import Moment
from stepladder.launch.bench.rig.priority import ahead_of_gloo
from stepladder.parallel.afd.edges import GlooEdge, Header
from stepladder.parallel.afd.wire import PLAIN
from stepladder.parallel.residual import Pending

STAMP = 8  # bytes of a float64


class LateWire:
    """The rows in their own dtype behind the time of their sending; read `late` seconds after that at the earliest."""

    name = "late"

    def __init__(self) -> None:
        self.late = 0.0

    def size(self, tokens: int, hidden: int, dtype: torch.dtype) -> int:
        return STAMP + PLAIN.size(tokens, hidden, dtype)

    def write(self, rows: Tensor, body: Tensor) -> None:
        body[:STAMP].view(torch.float64).fill_(time.perf_counter())
        PLAIN.write(rows, body[STAMP:])

    def read(self, body: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        due = body[:STAMP].view(torch.float64).item() + self.late
        time.sleep(max(0.0, due - time.perf_counter()))
        return PLAIN.read(body[STAMP:], hidden, dtype)


class WatchedEdge(GlooEdge):
    """A thread of its own waits for the messages while `watching`, so that it is known when each could be read.

    gloo_first: gloo's thread goes before the one that sends.
    """

    gloo_first = watching = False
    sent: list[Moment]
    came: list[Moment]

    @contextmanager
    def watch(self, on: bool) -> Iterator[None]:
        """Inside, and after it, `sent` and `came` are what was seen inside: nothing, if not `on`."""
        self.watching, self.sent, self.came = on, [], []
        with ThreadPoolExecutor(1) as self._watcher:
            yield
        self.watching = False

    def send(self, header: Header, rows: Tensor) -> None:
        if self.watching:
            self.sent.append(_moment(header))
        with ahead_of_gloo(self.gloo_first):
            super().send(header, rows)

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        with ahead_of_gloo(self.gloo_first):
            pending = super().receive(header, hidden, dtype)
        return _Watched(self._watcher.submit(self._wait, pending, header)) if self.watching else pending

    def _wait(self, pending: Pending, header: Header) -> Tensor:
        rows = pending.wait()
        self.came.append(_moment(header))
        return rows


class _Watched:
    def __init__(self, future: Future[Tensor]) -> None:
        self._future = future

    def wait(self) -> Tensor:
        return self._future.result()


def _moment(header: Header) -> Moment:
    return Moment(header.step, header.block, header.micro, time.perf_counter())
