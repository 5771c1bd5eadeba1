"""A rank process, with its part of each of the three cases: rank 0 is A, 1 and 2 are F; TP is 0 and 1."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.launch.bench.afd.real.load import Batch
from stepladder.launch.bench.afd.real.task import Load
from stepladder.launch.bench.rig.hosts import DEVICE
from stepladder.launch.bench.rig.processes import TIMEOUT, Start, serve
from stepladder.parallel.afd.edges import GlooEdge
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.balance import place_of
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.heads import heads_of
from stepladder.parallel.mesh import Group
from stepladder.parallel.model import Transformer
from stepladder.parallel.native import choose
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec

TP, BROADCAST, HOME = "TP 2", "broadcast", "home"
KINDS = (TP, BROADCAST, HOME)
M = TypeVar("M", bound=Transformer)
POOL = 2  # F ranks, and ranks of TP


@dataclass(frozen=True)
class Task:
    """A turn of one kind."""

    kind: str
    load: Load


@dataclass(frozen=True)
class Turn:
    """steps: seconds of each decode step after the first, where this rank knows. sent, received: bytes through this
    host's link in a step. tokens: [step][sequence], on rank 0."""

    steps: list[float]
    sent: float
    received: float
    tokens: list[list[int]]


class Rank:
    """One rank's part of each kind. Experts are split for TP and broadcast, whole for home."""

    def __init__(self, start: Start[str], store: dist.Store) -> None:
        self._spec, self._rank = ModelSpec.load(start.model), start.rank
        self._path, self._host, self._store = start.model, start.host, store
        self._turns: dict[str, Callable[[Load], tuple[list[float], list[list[int]]]]] = {}
        if start.rank < POOL:
            self._hold_shard()
        for kind in (BROADCAST, HOME):
            (self._hold_attention if start.rank == 0 else self._hold_experts)(kind)

    def __call__(self, task: Task) -> Turn:
        before = passed()
        steps, tokens = self._turns[task.kind](task.load) if task.kind in self._turns else ([], [])
        count = task.load.steps + 1
        sent, received = ((now - then) / count for now, then in zip(passed(), before, strict=True))
        return Turn(steps[1:], sent, received, tokens)

    def _hold_shard(self) -> None:
        shard = Shard(self._rank, POOL)
        mesh = self._group("tp", shard)
        model = self._ready(Transformer(self._spec, shard, mesh.all_reduce))

        def turn(load: Load) -> tuple[list[float], list[list[int]]]:
            batch = self._batch(load, heads_of(self._spec, shard).kv, model.native)

            def step(tokens: Tensor, number: int) -> Tensor:
                (context,) = batch.contexts(number, [len(tokens)])
                logits = mesh.gather(model.logits(model(tokens, context)))
                drawn = tokens if logits is None else logits[:, : self._spec.vocab_size].argmax(-1)
                return mesh.share(drawn)

            return _steps(batch.first, load.steps, step)

        self._turns[TP] = turn

    def _hold_attention(self, kind: str) -> None:
        side = self._ready(AttentionSide(self._spec))
        edges = [self._edge(kind, f, 0) for f in range(POOL)]

        def turn(load: Load) -> tuple[list[float], list[list[int]]]:
            batch = self._batch(load, range(self._spec.num_kv_heads), side.native)

            def step(tokens: Tensor, number: int) -> Tensor:
                contexts = batch.contexts(number, [len(tokens)])
                layout = Layout(0, number, ((len(tokens),),))
                (hidden,) = side([tokens], contexts, Link(edges, layout, self._spec, home=kind == HOME))
                return side.logits(hidden).argmax(-1)

            return _steps(batch.first, load.steps, step)

        self._turns[kind] = turn

    def _hold_experts(self, kind: str) -> None:
        shard, home = Shard(self._rank - 1, POOL), kind == HOME
        mesh = self._group(kind, shard)
        place = place_of(self._spec, shard, whole_experts=home, home=home)
        side = self._ready(FeedForwardSide(self._spec, place, mesh.all_reduce, mesh))
        edge = self._edge(kind, shard.rank, 1)

        def turn(load: Load) -> tuple[list[float], list[list[int]]]:
            for number in range(load.steps + 1):
                if side([edge], Layout(0, number, ((load.batch,),))):
                    raise RuntimeError("the A rank is lost; what it said is above")
            return [], []

        self._turns[kind] = turn

    def _ready(self, model: M) -> M:
        load_weights(model, self._path)
        choose(model)
        return model

    def _group(self, name: str, shard: Shard) -> Group:
        return Group(dist.PrefixStore(name, self._store), shard, "cpu", self._host, TIMEOUT)

    def _edge(self, kind: str, f: int, end: int) -> GlooEdge:
        return GlooEdge(self._store, f"{kind}-a0-f{f}", end, self._host, TIMEOUT)

    @lru_cache(maxsize=4)  # noqa: B019 a process has one rank
    def _batch(self, load: Load, heads: range, native: bool) -> Batch:
        return Batch(self._spec, load, heads, range(load.batch), native)


def _steps(tokens: Tensor, steps: int, step: Callable[[Tensor, int], Tensor]) -> tuple[list[float], list[list[int]]]:
    seconds, drawn = list[float](), list[list[int]]()
    for number in range(steps + 1):
        began = perf_counter()
        tokens = step(tokens, number)
        seconds.append(perf_counter() - began)
        drawn.append(tokens.tolist())
    return seconds, drawn


def passed() -> tuple[int, int]:
    """Bytes that this host's link has sent and received so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == DEVICE:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    return 0, 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(Rank, Start[str], Task)
