"""Runs StepPlans on an attention rank: the attention half of every layer here, the FFNs in the pool."""

import logging
from statistics import median

import torch
from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.parallel.afd.pool_link import Link, NoPool, Pool
from stepladder.parallel.afd.sides import AttentionSide
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.pack import pack_weights
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.membership import Membership
from stepladder.workers.afd.micro_batches import best_number, split
from stepladder.workers.core import StepPlan
from stepladder.workers.sampler import Drawn, draw

log = logging.getLogger(__name__)

PROBES = 5  # steps from which the number of micro-batches is measured


class AttentionExecutor:
    """One attention rank's half of the model and its KV cache; the same three methods as `Executor`, for an engine.

    Args:
        spec, path: the checkpoint.
        member: of the FFN pool.
        micro_batches: how many a step is split into; None measures, with steps of `probe_sequences` sequences.
        batch_invariant: round every row alike in any batch.

    Attributes:
        waited: seconds spent waiting for F.
    """

    def __init__(
        self,
        spec: ModelSpec,
        path: str,
        member: Membership,
        micro_batches: int | None,
        probe_sequences: int,
        batch_invariant: bool = False,
    ) -> None:
        self.member, self.micro_batches, self._probe_sequences = member, micro_batches, probe_sequences
        self._batch_invariant = batch_invariant
        self.waited = 0.0
        self.model = AttentionSide(spec).requires_grad_(False)
        load_weights(self.model, path)
        pack_weights(self.model, batch_invariant)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the KV cache, before the first step."""
        self.cache = KVCache(self.model.spec, self.model.num_kv_heads, num_blocks, block_size)

    @torch.inference_mode()
    def warm_up(self, tokens: int, sequences: int, block_size: int) -> None:
        """The largest step there can be, so that what the libraries allocate on the way is allocated."""
        blocks = -(-tokens // block_size)
        cache = KVCache(self.model.spec, self.model.num_kv_heads, blocks, block_size)
        hidden = self._run(StepPlan([0] * tokens, [0], [tokens], [list(range(blocks))]), 1, cache, NoPool())
        self.model.logits(hidden[-min(sequences, tokens) :])

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Drawn:
        """Run one step; an empty plan tells the pool not to wait for this rank."""
        if not plan.tokens:
            self.member.rest()
            return Drawn(plan, torch.zeros(0, dtype=torch.int64), [], None)
        if self.micro_batches is None:
            self.micro_batches = self._measure()
        hidden = self._run(plan, self.micro_batches, self.cache)
        return draw(self.model.logits(hidden[upload(plan.rows, hidden.device)]), plan)

    def stop(self) -> None:
        self.member.leave()

    def _run(self, plan: StepPlan, parts: int, cache: KVCache, pool: Pool | None = None) -> Tensor:
        """Final hidden states of all the plan's tokens [T, h]."""
        pieces = split(plan, parts)
        link: Pool | None = pool
        if link is None:
            link = self.member.open([len(piece.tokens) for piece in pieces])
            pieces += [StepPlan()] * (link.layout.micro_batches - len(pieces))
        contexts = [PagedSequences(cache, p.starts, p.lengths, p.block_tables, self._batch_invariant) for p in pieces]
        hidden = self.model([upload(p.tokens, cache.device) for p in pieces], contexts, link)
        if isinstance(link, Link):
            self.waited += link.waited
        return torch.cat(hidden)

    def _measure(self) -> int:
        """Micro-batches that keep F busy, from whole steps of decoding with the pool as it is."""
        count, layers = self._probe_sequences, self.model.spec.num_layers
        cache = KVCache(self.model.spec, self.model.num_kv_heads, count, 1)
        plan = StepPlan([0] * count, [0] * count, [1] * count, [[i] for i in range(count)])
        waits: list[float] = []
        ffn: list[float] = []
        for _ in range(PROBES):
            before = self.waited
            self._run(plan, 1, cache)
            waits.append((self.waited - before) / layers)
            ffn.append(self.member.ffn_seconds)  # of the step before
        busy = median(ffn[1:])
        transfer = (median(waits) - busy) / 2
        number = best_number(busy, transfer)
        log.info("an FFN takes %.2f ms, a transfer %.2f ms: %d micro-batches", 1e3 * busy, 1e3 * transfer, number)
        return number
