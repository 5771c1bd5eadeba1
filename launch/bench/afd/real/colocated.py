"""The two rank processes of the colocated cases: the same checkpoint sharded over both, or whole on each."""

from functools import lru_cache
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.launch.bench.afd.real.load import Batch, load_spec
from stepladder.launch.bench.afd.real.rank import Rank
from stepladder.launch.bench.afd.real.task import REPLICAS, TP, Decoded, Load, Modules, Task, micro_sizes
from stepladder.launch.bench.rig.late import LateGroup
from stepladder.launch.bench.rig.meeting import meet
from stepladder.launch.bench.rig.priority import communication_first
from stepladder.launch.bench.rig.processes import TIMEOUT, Start, serve
from stepladder.launch.bench.rig.spans import Window
from stepladder.parallel.heads import heads_of
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Shard

RANKS = 2


class ColocatedRank(Rank):
    """A shard for TP and the whole model for replicas. `late` delays a reduce once, the least that any takes."""

    def __init__(self, start: Start[str], store: dist.Store) -> None:
        self.spec, self.shard = load_spec(start.model), Shard(start.rank, RANKS)
        self.mesh = LateGroup(dist.PrefixStore("colocated", store), self.shard, "cpu", start.host, TIMEOUT)
        communication_first()
        self.models = {TP: Transformer(self.spec, self.shard, self.mesh.all_reduce), REPLICAS: Transformer(self.spec)}
        super().__init__(start.model, self.models, self.mesh, ways=1)

    def decode(self, task: Task) -> Decoded:
        kind, steps, drawn = task.case.kind, list[Window](), list[list[int]]()
        batch = self._batch(kind, task.load)
        tokens = batch.first
        for number in range(task.load.steps + 1):
            began = perf_counter()
            with self.record.rest("contexts"):
                (context,) = batch.contexts(number, [len(tokens)])
            tokens = self._draw(kind, self.models[kind](tokens, context))
            drawn.append(tokens.tolist())
            steps.append((began, perf_counter()))
        return Decoded(steps[1:], self.record.take(), drawn)

    def meet(self) -> None:
        meet(self.mesh)

    def modules(self, task: Task) -> Modules:
        batch = self._batch(task.case.kind, task.load)
        return self.step_alone(task.case.kind, batch, len(batch.first))

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

    def exchange(self, rows: int, count: int) -> float:
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
            return Batch(
                self.spec, load, heads_of(self.spec, self.shard).kv, range(load.batch), self._models[kind].native
            )
        first = micro_sizes(load.batch, RANKS)[0]
        which = range(first) if self.shard.rank == 0 else range(first, load.batch)
        return Batch(self.spec, load, range(self.spec.num_kv_heads), which, self._models[kind].native)


if __name__ == "__main__":
    serve(ColocatedRank, Start[str], Task)
