"""The forward of an attention rank: the attention half of every layer here, the FFNs in a pool of other ranks."""

import logging
from statistics import median

import torch
from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.parallel.afd.pool_link import Link, Pool
from stepladder.parallel.afd.sides import AttentionSide
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.native import AUTO
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.membership import Membership
from stepladder.workers.afd.micro_batches import best_number, split
from stepladder.workers.assembly import fill
from stepladder.workers.core import StepPlan
from stepladder.workers.executor import Executor
from stepladder.workers.forward import Forward

log = logging.getLogger(__name__)

PROBES = 5  # steps from which the number of micro-batches is measured


class PoolForward(Forward):
    """See there.

    Args:
        model: this rank's half.
        member: of the FFN pool.
        micro_batches: how many a step is split into; None measures, with steps of `probe_sequences` sequences.

    Attributes:
        waited: seconds spent waiting for F.
    """

    model: AttentionSide

    def __init__(
        self,
        model: AttentionSide,
        member: Membership,
        micro_batches: int | None,
        probe_sequences: int,
    ) -> None:
        self.model, self.member, self.micro_batches = model, member, micro_batches
        self._probe_sequences = probe_sequences
        self.waited = 0.0

    def run(self, plan: StepPlan, tokens: Tensor) -> Tensor:
        if self.micro_batches is None:
            self.micro_batches = self._measure()
        hidden = self._step(plan, tokens, self.micro_batches, self._cache)
        return hidden[upload(plan.rows, hidden.device)]

    def alone(self, plan: StepPlan, tokens: Tensor, cache: KVCache) -> Tensor:
        """FFNs answer with zeros."""
        return self._step(plan, tokens, 1, cache, Pool())

    def idle(self) -> None:
        """Tell the pool not to wait for this rank."""
        self.member.idle()

    def stop(self) -> None:
        self.member.leave()

    def _step(self, plan: StepPlan, tokens: Tensor, parts: int, cache: KVCache, pool: Pool | None = None) -> Tensor:
        """Final hidden states of all the plan's tokens [T, h]."""
        pieces, link = split(plan, parts), pool
        if link is None:
            link = self.member.open([len(piece.tokens) for piece in pieces])
            pieces += [StepPlan()] * (link.layout.micro_batches - len(pieces))
        contexts = [PagedSequences(cache, p.starts, p.lengths, p.block_tables) for p in pieces]
        hidden = self.model(tokens.split([len(piece.tokens) for piece in pieces]), contexts, link)
        if isinstance(link, Link):
            self.waited += link.waited
        return torch.cat(hidden)

    def _measure(self) -> int:
        """Micro-batches that keep F busy, from whole steps of decoding with the pool as it is."""
        count, layers = self._probe_sequences, self.model.spec.num_layers
        cache = self.model.cache(count, 1)
        plan = StepPlan([0] * count, [0] * count, [1] * count, [[i] for i in range(count)])
        waits: list[float] = []
        ffn: list[float] = []
        for _ in range(PROBES):
            before = self.waited
            self._step(plan, upload(plan.tokens, cache.device), 1, cache)
            waits.append((self.waited - before) / layers)
            ffn.append(self.member.ffn_seconds)  # of the step before
        busy = median(ffn[1:])
        transfer = (median(waits) - busy) / 2
        number = best_number(busy, transfer)
        log.info("an FFN takes %.2f ms, a transfer %.2f ms: %d micro-batches", 1e3 * busy, 1e3 * transfer, number)
        return number


def attention_executor(
    spec: ModelSpec,
    path: str,
    member: Membership,
    micro_batches: int | None,
    probe_sequences: int,
    kernels: str = AUTO,
    mesh: SingleRank | None = None,
) -> Executor:
    """The attention half of the model on one rank, FFNs in a pool; arguments as `PoolForward`'s."""
    mesh = mesh or SingleRank()
    fill(model := AttentionSide(spec), path, mesh, kernels)
    forward = PoolForward(model, member, micro_batches, probe_sequences)
    return Executor(forward, mesh)
