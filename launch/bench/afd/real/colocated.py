"""The two rank processes of the colocated cases: the same checkpoint sharded over both, or whole on each."""

from functools import lru_cache
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.launch.bench.afd.real.load import Batch, load_spec, with_tables
from stepladder.launch.bench.afd.real.task import (
    REPLICAS,
    TP,
    Decoded,
    Load,
    Modules,
    Task,
    Transfer,
    micro_sizes,
)
from stepladder.launch.bench.rig.late import LateGroup
from stepladder.launch.bench.rig.meeting import meet
from stepladder.launch.bench.rig.priority import communication_first
from stepladder.launch.bench.rig.processes import TIMEOUT, Start, serve
from stepladder.launch.bench.rig.spans import Recorder, Window
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import kv_heads_of
from stepladder.parallel.pack import pack_weights
from stepladder.parallel.shards import Shard
from stepladder.parallel.wiring import SEATS

RANKS = 2
TRIES = 3  # of one measurement of a reduce


class Rank:
    """A shard for TP and the whole model for replicas. `late` delays a reduce once, the least that any takes."""

    def __init__(self, start: Start[str], store: dist.Store) -> None:
        self.spec, self.shard, self.record = load_spec(start.model), Shard(start.rank, RANKS), Recorder()
        self.mesh = LateGroup(dist.PrefixStore("colocated", store), self.shard, "cpu", start.host, TIMEOUT)
        communication_first()
        self.models = {TP: Transformer(self.spec, self.shard, self.mesh.all_reduce), REPLICAS: Transformer(self.spec)}
        for model in self.models.values():
            load_weights(model, start.model)
            pack_weights(model)
        self._plain = {kind: model.blocks for kind, model in self.models.items()}
        self._blocks = {
            (kind, lag): [self.record.block(b, b.name, lag) for b in plain]
            for kind, plain in self._plain.items()
            for lag in (0, 1)
        }

    def __call__(self, task: Task) -> Decoded | Modules | Transfer:
        self.mesh.late = task.load.late
        if task.what == "transfer":
            seconds = [[self._reduces(task.rows, count) for _ in range(TRIES)] for count in (1, 2)]
            one, two = (sorted(each)[TRIES // 2] for each in seconds)
            return Transfer(one, max(0.0, two - one))
        batch = self._batch(task.case.kind, task.load)
        meet(self.mesh)
        if task.what == "modules":
            return self._modules(task.case.kind, batch)
        self.models[task.case.kind].blocks = self._blocks[task.case.kind, task.case.lag]
        steps, tokens = self._decode(task.case.kind, batch)
        return Decoded(steps[1:], self.record.take(), tokens)

    def _decode(self, kind: str, batch: Batch) -> tuple[list[Window], list[list[int]]]:
        tokens, steps, drawn = batch.first, list[Window](), list[list[int]]()
        for number in range(batch.load.steps + 1):
            began = perf_counter()
            with self.record.rest("contexts"):
                (context,) = batch.contexts(number, [len(tokens)])
            tokens = self._draw(kind, self.models[kind](tokens, context))
            drawn.append(tokens.tolist())
            steps.append((began, perf_counter()))
        return steps, drawn

    def _draw(self, kind: str, hidden: Tensor) -> Tensor:
        """The most likely token of each row; TP ranks tell each other only their best, not all logits."""
        model = self.models[kind]
        with self.record.rest("head"):
            first = model.head.first
            best, index = model.logits(hidden)[:, : self.spec.vocab_size - first].max(-1)
        if kind == REPLICAS:
            return index
        table = torch.zeros(RANKS, 2, len(hidden), dtype=torch.float64)
        table[self.shard.rank] = torch.stack((best.double(), (index + first).double()))
        best, index = self.mesh.all_reduce(table).wait().unbind(1)
        return index.gather(0, best.argmax(0, keepdim=True))[0].long()

    def _modules(self, kind: str, batch: Batch) -> Modules:
        model, began = self.models[kind], perf_counter()
        (context,) = batch.contexts(0, [len(batch.first)])
        with_tables(context, model)
        x = model.embedding.embed(batch.first)
        model.logits(model.norm(x)).argmax(-1)
        rest, seconds = perf_counter() - began, dict.fromkeys(SEATS, 0.0)
        for block in self._plain[kind]:
            (seat,), began = block.seats, perf_counter()
            block(x, context)
            seconds[seat] += perf_counter() - began
        attention, ffn = (seconds[seat] / self.spec.num_layers for seat in SEATS)
        return Modules(attention, ffn, rest)

    def _reduces(self, rows: int, count: int) -> float:
        """Seconds from the first issue to the last completion of `count` reduces issued together."""
        tensors = [torch.ones(rows, self.spec.hidden_size, dtype=self.spec.dtype) for _ in range(count)]
        meet(self.mesh)
        began = perf_counter()
        for pending in [self.mesh.all_reduce(tensor) for tensor in tensors]:
            pending.wait()
        return perf_counter() - began

    @lru_cache(maxsize=2)  # noqa: B019 a process has one rank
    def _batch(self, kind: str, load: Load) -> Batch:
        if kind == TP:
            return Batch(self.spec, load, kv_heads_of(self.spec, self.shard), range(load.batch))
        first = micro_sizes(load.batch, RANKS)[0]
        which = range(first) if self.shard.rank == 0 else range(first, load.batch)
        return Batch(self.spec, load, range(self.spec.num_kv_heads), which)


if __name__ == "__main__":
    serve(Rank, Start[str], Task)
