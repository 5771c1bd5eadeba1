"""The one place where an engine is put together: for a server's rank, for `LLM`, for a bench, for a test.

An engine comes to be in two steps, since the ranks of a group agree on the size of the cache between them:
`load` (weights, executor), then `begin` (cache, engine).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from stepladder.parallel.balance import place_of
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.model import Transformer
from stepladder.parallel.native import AUTO, TORCH, choose
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.forward import WholeForward
from stepladder.workers.grammar.compiler import Grammars
from stepladder.workers.graphs import Capture, CudaCapture
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.sampler import sample_among
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafters.head import Cell
from stepladder.workers.speculation.head.files import read_head
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.speculator import Speculator
from stepladder.workers.text.tokenizer import Tokenizer

NO_SPECULATION = SpeculateConfig()


def load(
    spec: ModelSpec, path: str, mesh: Mesh, config: EngineConfig, balance: bool = False, whole_experts: bool = False
) -> Executor:
    """This rank's shard of the whole model, as an engine's options want it; without a cache yet.

    Args:
        balance, whole_experts: as `place_of` takes them.

    Raises:
        ValueError: the checkpoint or an option is unusable.
    """
    capture = CudaCapture(mesh.device) if config.graphs_on(mesh.device) else None
    return whole_executor(
        spec, path, mesh, kernels=config.wanted_kernels, capture=capture, balance=balance, whole_experts=whole_experts
    )


def begin(
    executor: Executor,
    config: EngineConfig,
    kv: KvConfig,
    kv_tokens: int,
    tokenizer: Callable[[], Tokenizer],
    speculate: SpeculateConfig = NO_SPECULATION,
    target: "Target | None" = None,
) -> Engine:
    """Make the cache of `kv_tokens`, on every rank of the group alike, and the engine, which rank 0 runs.

    Args:
        tokenizer: the model's; asked for when a request first needs it.
        speculate: who drafts tokens, if somebody does.
        target: what its drafter shares with whoever gives it other weights later; one that has none yet waits for them.

    Raises:
        ValueError: the limits contradict each other or the model.
    """
    limits = config.limits(executor.model.spec, kv, kv_tokens, executor.mesh.device)
    executor.allocate(limits.num_blocks, limits.block_size)
    engine = Engine(limits, executor, Grammars(tokenizer, executor.model.spec.vocab_size))
    engine.stats.native_kernels = int(executor.model.native)
    if executor.mesh.shard.rank == 0:
        taught = target is not None
        if drafter := speculate.drafter(limits, target or Target(executor), online=taught):
            engine.speculate(Speculator(drafter, speculate, engine.stats))
    return engine


class Target:
    """What a drafter is given of the model that it drafts for, on rank 0 alone.

    Args:
        first: the directory of a head that counts as version 0, whatever it says.
    """

    def __init__(self, executor: Executor, first: str | None = None) -> None:
        self.executor, self._first = executor, first

    @property
    def vocab_size(self) -> int:
        return self.executor.model.spec.vocab_size

    def runner(self, path: str, limits: SchedulerConfig) -> Executor:
        """With as much room as the engine has."""
        own = ModelSpec.load(path)
        if own.vocab_size != self.vocab_size:
            raise ValueError(
                f"speculate.model has {own.vocab_size} tokens, the model that it drafts for {self.vocab_size}; it must "
                "have the same tokenizer"
            )
        mesh = SingleRank(self.executor.mesh.device)
        return whole_executor(own, path, mesh, limits.num_blocks, limits.block_size)

    def head(self, path: str) -> Cell:
        """From any thread."""
        model = self.executor.model
        assert model.directory is not None
        head = read_head(path, model.directory, model.spec)
        if path == self._first:
            head = replace(head, manifest=replace(head.manifest, version=0))
        return Cell(head, self._vocabulary, model.native, sample_among)

    @cached_property
    def _vocabulary(self) -> TargetVocabulary:
        model = self.executor.model
        assert model.directory is not None
        return TargetVocabulary(model.spec, model.directory, self.executor.mesh.device)


def whole_executor(
    spec: ModelSpec,
    path: str,
    mesh: Mesh,
    num_blocks: int = 0,
    block_size: int = 16,
    measure_every: int = 16,
    kernels: str = AUTO,
    capture: Capture | None = None,
    balance: bool = False,
    whole_experts: bool = False,
) -> Executor:
    """All of the model on one group; arguments as `WholeForward`'s.

    Args:
        spec, path: the checkpoint.
        balance, whole_experts: as `place_of` takes them.
        num_blocks, block_size: the KV cache, as in `Executor.allocate`; without blocks that is called later.
    """
    with torch.device(mesh.device):
        model = Transformer(spec, place_of(spec, mesh.shard, balance, whole_experts), mesh.all_reduce)
    fill(model, path, mesh, TORCH if capture else kernels)
    executor = Executor(WholeForward(model, mesh, measure_every, capture), mesh)
    if num_blocks:
        executor.allocate(num_blocks, block_size)
    return executor


def fill(model: Transformer, path: str | Path, mesh: Mesh, kernels: str = AUTO) -> None:
    """Weights for inference, laid out for this machine; `mesh` notes how far that is."""
    load_weights(model.requires_grad_(False), path, mesh.note_loaded)
    model.directory = str(path)
    choose(model, kernels)
