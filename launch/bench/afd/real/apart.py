"""The two rank processes of the disaggregated cases: halves of one checkpoint, and one edge over the link."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.launch.bench.afd.real.load import Batch, load_spec
from stepladder.launch.bench.afd.real.rank import Rank
from stepladder.launch.bench.afd.real.task import AFD, Decoded, Load, Modules, Moment, Task, micro_sizes
from stepladder.launch.bench.rig.late import LateWire
from stepladder.launch.bench.rig.priority import ahead_of_gloo, communication_first
from stepladder.launch.bench.rig.processes import TIMEOUT, Start, serve
from stepladder.launch.bench.rig.spans import Window
from stepladder.parallel.afd.edges import INPUT, GlooEdge, Header, Later
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.residual import Pending

Side = TypeVar("Side", AttentionSide, FeedForwardSide)


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


class HalfRank(Rank, Generic[Side]):
    """What both ranks do alike."""

    def __init__(self, side: Side, start: Start[str], store: dist.Store) -> None:
        wire = LateWire()
        super().__init__(start.model, {AFD: side}, wire, ways=2)
        self.side: Side = side
        self.spec, self._first = side.spec, start.rank == 0
        self.edge = WatchedEdge(store, "a0-f0", start.rank, start.host, TIMEOUT, send_as=wire, receive_as=wire)
        self.edge.names = {INPUT: "x_0", **{number: block.name for number, block in enumerate(side.blocks)}}
        self.edge.gloo_first = communication_first()

    def decode(self, task: Task) -> Decoded:
        with self.edge.watch(task.traced):
            steps, tokens = self.steps(task.load, micro_sizes(task.load.batch, task.case.micro_batches))
        return Decoded(steps[1:], self.record.take(), tokens, self.edge.sent, self.edge.came)

    @abstractmethod
    def steps(self, load: Load, sizes: list[int]) -> tuple[list[Window], list[list[int]]]:
        """All steps of a turn, in micro-batches of these sizes: when they were, and what was drawn."""

    def meet(self) -> None:
        self.exchange(1, 1)

    def exchange(self, rows: int, count: int) -> float:
        """Seconds in which `count` messages that A sends together are at F and, each at once, back again."""
        headers = [layout(number, [rows]).header(INPUT, 0) for number in range(count)]
        pending = [self.edge.receive(header, self.spec.hidden_size, self.spec.dtype) for header in headers]
        mine, began = torch.ones(rows, self.spec.hidden_size, dtype=self.spec.dtype), perf_counter()
        if self._first:
            for header in headers:
                self.edge.send(header, mine)
        for header, message in zip(headers, pending, strict=True):
            rows_back = message.wait()
            if not self._first:
                self.edge.send(header, rows_back)
        seconds = perf_counter() - began
        self.edge.settle()
        return seconds


class AttentionRank(HalfRank[AttentionSide]):
    """Owns the sequences: embeds, draws greedily, and begins the next step with what it drew."""

    def steps(self, load: Load, sizes: list[int]) -> tuple[list[Window], list[list[int]]]:
        batch, steps, drawn = self._batch(load), list[Window](), list[list[int]]()
        tokens = list(batch.first.split(sizes))
        for number in range(load.steps + 1):
            began = perf_counter()
            with self.record.rest("contexts"):
                contexts = batch.contexts(number, sizes)
            hidden = self.side(tokens, contexts, Link([self.edge], layout(number, sizes), self.spec))
            with self.record.rest("head"):
                tokens = [self.side.logits(x).argmax(-1) for x in hidden]
                drawn.append(torch.cat(tokens).tolist())
            steps.append((began, perf_counter()))
        return steps, drawn

    def modules(self, task: Task) -> Modules:
        return self.step_alone(AFD, self._batch(task.load), task.rows)

    @lru_cache(maxsize=1)  # noqa: B019 a process has one rank
    def _batch(self, load: Load) -> Batch:
        return Batch(self.spec, load, range(self.spec.num_kv_heads), range(load.batch), self.side.native)


class FeedForwardRank(HalfRank[FeedForwardSide]):
    """Computes what A opens, and knows of nothing else."""

    def steps(self, load: Load, sizes: list[int]) -> tuple[list[Window], list[list[int]]]:
        for number in range(load.steps + 1):
            if self.side([self.edge], layout(number, sizes)):
                raise RuntimeError("the A rank is lost; what it said is above")
        return [], []

    def modules(self, task: Task) -> Modules:
        x = torch.ones(task.rows, self.spec.hidden_size, dtype=self.spec.dtype)
        return self.layer_alone(AFD, x, None)


def layout(number: int, sizes: Sequence[int]) -> Layout:
    """Of step `number` with one A rank."""
    return Layout(0, number, (tuple(sizes),))


def rank_of(start: Start[str], store: dist.Store) -> HalfRank:
    spec = load_spec(start.model)
    if start.rank == 0:
        return AttentionRank(AttentionSide(spec), start, store)
    return FeedForwardRank(FeedForwardSide(spec), start, store)


if __name__ == "__main__":
    serve(rank_of, Start[str], Task)
