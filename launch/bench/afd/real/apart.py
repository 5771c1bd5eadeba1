"""The two rank processes of the disaggregated cases: halves of one checkpoint, and one edge over the link."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.launch.bench.afd.real.edge import WatchedEdge
from stepladder.launch.bench.afd.real.load import Batch, load_spec, with_tables
from stepladder.launch.bench.afd.real.task import Decoded, Load, Modules, Task, Transfer, micro_sizes
from stepladder.launch.bench.rig.late import LateWire
from stepladder.launch.bench.rig.priority import communication_first
from stepladder.launch.bench.rig.processes import TIMEOUT, Start, serve
from stepladder.launch.bench.rig.spans import Recorder, Window
from stepladder.parallel.afd.edges import INPUT
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import PagedSequences
from stepladder.parallel.pack import pack_weights

TRIES = 3  # of one measurement of a transfer
Side = TypeVar("Side", AttentionSide, FeedForwardSide)


def attention_step(
    side: AttentionSide, tokens: list[Tensor], contexts: list[PagedSequences], edge: WatchedEdge, layout: Layout
) -> list[Tensor]:
    """Tokens [T] of each micro-batch -> final hidden states [T, h]."""
    return side(tokens, contexts, Link([edge], layout, side.spec))


def feed_forward_step(side: FeedForwardSide, edge: WatchedEdge, layout: Layout) -> None:
    if side([edge], layout):
        raise RuntimeError("the A rank is lost; what it said is above")


class Rank(ABC, Generic[Side]):
    """What both ranks do alike."""

    def __init__(self, side: Side, start: Start[str], store: dist.Store) -> None:
        self.side: Side = side
        self.spec, self.record, self.wire = side.spec, Recorder(), LateWire()
        load_weights(side, start.model)
        pack_weights(side)
        self._plain, self._first = side.blocks, start.rank == 0
        self._blocks = {lag: [self.record.block(b, b.name, lag) for b in side.blocks] for lag in (0, 1)}
        wire, name = self.wire, "a0-f0"
        self.edge = WatchedEdge(store, name, start.rank, start.host, TIMEOUT, send_as=wire, receive_as=wire)
        self.edge.names = {INPUT: "x_0", **{number: block.name for number, block in enumerate(side.blocks)}}
        self.edge.gloo_first = communication_first()

    def __call__(self, task: Task) -> Decoded | Modules | Transfer:
        self.wire.late = task.load.late
        if task.what == "transfer":
            seconds = [[self._exchange(task.rows, count) for _ in range(TRIES)] for count in (1, 2)]
            one, two = (sorted(each)[TRIES // 2] for each in seconds)
            return Transfer(one / 2, max(0.0, two - one))
        if task.what == "modules":
            if task.together:
                self._exchange(1, 1)
            return self.modules(task.load, task.rows)
        return self._turn(task)

    @abstractmethod
    def decode(self, load: Load, sizes: list[int]) -> tuple[list[Window], list[list[int]]]:
        """All steps of a turn, in micro-batches of these sizes: when they were, and what was drawn."""

    @abstractmethod
    def modules(self, load: Load, rows: int) -> Modules:
        """What a layer takes on this side, without communication."""

    def alone(self, x: Tensor, context: PagedSequences | None) -> float:
        """Seconds of a layer's module on this side, the mean of all layers."""
        mine = [block for block in self._plain if block.modules]
        began = perf_counter()
        for block in mine:
            block(x, context)
        return (perf_counter() - began) / len(mine)

    def _turn(self, task: Task) -> Decoded:
        self.side.blocks = self._blocks[task.case.lag]
        self._exchange(1, 1)  # both begin together
        with self.edge.watch(task.traced):
            steps, tokens = self.decode(task.load, micro_sizes(task.load.batch, task.case.micro_batches))
        return Decoded(steps[1:], self.record.take(), tokens, self.edge.sent, self.edge.came)

    def _exchange(self, rows: int, count: int) -> float:
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


class AttentionRank(Rank[AttentionSide]):
    """Owns the sequences: embeds, draws greedily, and begins the next step with what it drew."""

    def decode(self, load: Load, sizes: list[int]) -> tuple[list[Window], list[list[int]]]:
        batch, steps, drawn = self._batch(load), list[Window](), list[list[int]]()
        tokens = list(batch.first.split(sizes))
        for number in range(load.steps + 1):
            began = perf_counter()
            with self.record.rest("contexts"):
                contexts = batch.contexts(number, sizes)
            hidden = attention_step(self.side, tokens, contexts, self.edge, layout(number, sizes))
            with self.record.rest("head"):
                tokens = [self.side.logits(x).argmax(-1) for x in hidden]
                drawn.append(torch.cat(tokens).tolist())
            steps.append((began, perf_counter()))
        return steps, drawn

    def modules(self, load: Load, rows: int) -> Modules:
        batch, began = self._batch(load), perf_counter()
        (context,) = batch.contexts(0, [rows])
        with_tables(context, self.side)
        x = self.side.embedding.embed(batch.first[:rows])
        self.side.logits(self.side.norm(x)).argmax(-1)
        rest = perf_counter() - began
        return Modules(self.alone(x, context), 0.0, rest)

    @lru_cache(maxsize=1)  # noqa: B019 a process has one rank
    def _batch(self, load: Load) -> Batch:
        return Batch(self.spec, load, range(self.spec.num_kv_heads), range(load.batch))


class FeedForwardRank(Rank[FeedForwardSide]):
    """Computes what A opens, and knows of nothing else."""

    def decode(self, load: Load, sizes: list[int]) -> tuple[list[Window], list[list[int]]]:
        for number in range(load.steps + 1):
            feed_forward_step(self.side, self.edge, layout(number, sizes))
        return [], []

    def modules(self, load: Load, rows: int) -> Modules:
        x = torch.ones(rows, self.spec.hidden_size, dtype=self.spec.dtype)
        return Modules(0.0, self.alone(x, None), 0.0)


def layout(number: int, sizes: Sequence[int]) -> Layout:
    """Of step `number` with one A rank."""
    return Layout(0, number, (tuple(sizes),))


def rank_of(start: Start[str], store: dist.Store) -> Rank:
    spec = load_spec(start.model)
    if start.rank == 0:
        return AttentionRank(AttentionSide(spec), start, store)
    return FeedForwardRank(FeedForwardSide(spec), start, store)


if __name__ == "__main__":
    serve(rank_of, Start[str], Task)
