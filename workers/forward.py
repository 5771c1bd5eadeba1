"""From a plan's tokens to hidden states: what differs between executors. Here with all of the model on one group of
ranks; `afd/pool_forward.py` has only attention and leaves the FFNs to a pool."""

from abc import ABC, abstractmethod

from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.workers.core import StepPlan
from stepladder.workers.graphs import Capture, DecodeGraphs


class Forward(ABC):
    """What an executor asks of a model. Every rank of a group makes the same calls.

    Attributes:
        spare_blocks: cache blocks that it needs besides those of the sequences; they are the last ones.
    """

    model: Transformer
    spare_blocks = 0

    def begin(self, cache: KVCache) -> None:
        """From now on `run` writes to and reads from this cache."""
        self._cache = cache

    @abstractmethod
    def run(self, plan: StepPlan, tokens: Tensor) -> Tensor:
        """One step with the plan's tokens [T], all of them known: final hidden states of its rows [R, hidden]."""

    @abstractmethod
    def alone(self, plan: StepPlan, tokens: Tensor, cache: KVCache) -> Tensor:
        """The same with a cache that is not the engine's, and with no help of other groups: to measure what a step
        takes. Final hidden states of all tokens [T, hidden]."""

    def idle(self) -> None:  # noqa: B027
        """There is nothing to do; called about once a second."""

    def stop(self) -> None:  # noqa: B027
        """There will be no more steps."""


class WholeForward(Forward):
    """All of the model on one group.

    Args:
        model: this rank's shard. mesh: its group.
        measure_every: on CPU, reduces of every n-th step are time-stamped.
        capture: records decode steps, so that they are launched as one; None launches every kernel by itself.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        measure_every: int = 16,
        capture: Capture | None = None,
    ) -> None:
        self.model, self._mesh, self._capture = model, mesh, capture
        self._measure_every, self._steps = measure_every, 0
        self._measures = mesh.device.type == "cpu"  # the stamps are the host's, which on CUDA is far ahead
        self.spare_blocks = 1 if capture else 0
        self.graphs: DecodeGraphs | None = None

    def begin(self, cache: KVCache) -> None:
        super().begin(cache)
        self.graphs = DecodeGraphs(self.model, cache, self._capture) if self._capture else None

    def run(self, plan: StepPlan, tokens: Tensor) -> Tensor:
        self._steps += 1
        if self.graphs and self.graphs.fits(plan):
            self._mesh.meter.on = False
            return self.graphs.run(tokens, plan)
        self._mesh.meter.on = self._measures and self._steps % self._measure_every == 0
        hidden = self.alone(plan, tokens, self._cache)
        return hidden[upload(plan.rows, self._mesh.device)] if plan.rows else hidden[:0]

    def alone(self, plan: StepPlan, tokens: Tensor, cache: KVCache) -> Tensor:
        context = PagedSequences(cache, plan.starts, plan.lengths, plan.block_tables)
        return self.model(tokens, context)
