"""An edge whose messages can be watched."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from stepladder.launch.bench.afd.real.task import Moment
from stepladder.launch.bench.rig.priority import ahead_of_gloo
from stepladder.parallel.afd.edges import GlooEdge, Header, Later
from stepladder.parallel.residual import Pending


class WatchedEdge(GlooEdge):
    """A thread of its own waits for the messages while `watching`, so that it is known when each could be read.

    gloo_first: gloo's thread goes before the one that sends. names: of the blocks, by their numbers in headers.
    """

    gloo_first = watching = False
    names: dict[int, str]
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
            self.sent.append(self._moment(header))
        with ahead_of_gloo(self.gloo_first):
            super().send(header, rows)

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        with ahead_of_gloo(self.gloo_first):
            pending = super().receive(header, hidden, dtype)
        return Later(self._watcher.submit(self._wait, pending, header).result) if self.watching else pending

    def _wait(self, pending: Pending, header: Header) -> Tensor:
        rows = pending.wait()
        self.came.append(self._moment(header))
        return rows

    def _moment(self, header: Header) -> Moment:
        return Moment(header.step, self.names[header.block], header.micro, perf_counter())
