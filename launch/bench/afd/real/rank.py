"""What a rank process does with a task, whatever it holds of the model and however it is connected."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from stepladder.launch.bench.afd.real.load import Batch
from stepladder.launch.bench.afd.real.task import Decoded, Modules, Task, Transfer
from stepladder.launch.bench.rig.spans import Recorder
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import PagedSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.native import choose
from stepladder.parallel.wiring import SEATS

TRIES = 3  # of one measurement of a transfer


class Rank(ABC):
    """One rank.

    Args:
        path: of the checkpoint. models: by kind of case, what this rank holds of it.
        late: a group or a wire, whose `late` a load tells.
        ways: how often `exchange` goes over the link.
    """

    def __init__(self, path: str, models: Mapping[str, Transformer], late: Any, ways: int) -> None:
        self.record, self._models, self._late, self._ways = Recorder(), models, late, ways
        for model in models.values():
            load_weights(model, path)
            choose(model)
        self._plain = {kind: model.blocks for kind, model in models.items()}
        self._blocks = {
            (kind, lag): [self.record.block(b, b.name, lag) for b in plain]
            for kind, plain in self._plain.items()
            for lag in (0, 1)
        }

    def __call__(self, task: Task) -> Decoded | Modules | Transfer:
        self._late.late = task.load.late
        if task.what == "transfer":
            one, two = (median(self.exchange(task.rows, count) for _ in range(TRIES)) for count in (1, 2))
            return Transfer(one / self._ways, max(0.0, two - one))
        if task.what == "modules":
            if task.together:
                self.meet()
            return self.modules(task)
        self._models[task.case.kind].blocks = self._blocks[task.case.kind, task.case.lag]
        self.meet()
        return self.decode(task)

    @abstractmethod
    def meet(self) -> None:
        """A moment that both ranks share."""

    @abstractmethod
    def exchange(self, rows: int, count: int) -> float:
        """Seconds that `count` messages or reduces take that are issued together."""

    @abstractmethod
    def decode(self, task: Task) -> Decoded:
        """A turn."""

    @abstractmethod
    def modules(self, task: Task) -> Modules:
        """What a layer takes here, without communication."""

    def step_alone(self, kind: str, batch: Batch, rows: int) -> Modules:
        """The modules of a step with so many of the batch's rows, and what is left of it but communication."""
        model, first, began = self._models[kind], batch.first[:rows], perf_counter()
        (context,) = batch.contexts(0, [len(first)])
        x = model.embed(first, context)
        model.logits(model.norm(x)).argmax(-1)
        return self.layer_alone(kind, x, context, perf_counter() - began)

    def layer_alone(self, kind: str, x: Tensor, context: PagedSequences | None, rest: float = 0.0) -> Modules:
        """The mean of all layers."""
        seconds = dict.fromkeys(SEATS, 0.0)
        for block in self._plain[kind]:
            if block.modules:
                (seat,), began = block.seats, perf_counter()
                block(x, context)
                seconds[seat] += perf_counter() - began
        attention, ffn = (total / self._models[kind].spec.num_layers for total in seconds.values())
        return Modules(attention, ffn, rest)
