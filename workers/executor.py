"""Runs StepPlans on one rank: rank 0 leads (broadcasts the plan, samples), the other ranks follow."""

import torch

from parallel.checkpoint import load_weights
from parallel.context import KVCache, PagedSequences
from parallel.mesh import Mesh
from parallel.model import Transformer
from parallel.pack import pack_weights
from parallel.spec import ModelSpec
from workers.codec import decode, encode
from workers.core import StepPlan, StepResult
from workers.sampler import resolve


class Executor:
    """One rank's model and KV cache.

    Args:
        spec, path: the checkpoint.
        mesh: this rank's group.
        num_blocks, block_size: the KV cache, as in `allocate`; without blocks that is called later.
        measure_every: reduces of every n-th step are time-stamped.
        batch_invariant: round every row alike in any batch. The mesh must then be an `ordered` one.
    """

    STOP = -1  # as the only integer of a broadcast: leave the loop

    def __init__(
        self,
        spec: ModelSpec,
        path: str,
        mesh: Mesh,
        num_blocks: int = 0,
        block_size: int = 16,
        measure_every: int = 16,
        batch_invariant: bool = False,
    ) -> None:
        self.mesh, self._measure_every, self._steps = mesh, measure_every, 0
        self._batch_invariant = batch_invariant
        with torch.device(mesh.device):
            self.model = Transformer(spec, mesh.shard, mesh.all_reduce).requires_grad_(False)
        load_weights(self.model, path)
        pack_weights(self.model, batch_invariant)
        if num_blocks:
            self.allocate(num_blocks, block_size)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the KV cache; equal on every rank, and before the first step."""
        self.cache = KVCache(self.model.spec, self.model.num_kv_heads, num_blocks, block_size, self.mesh.device)

    def run(self, plan: StepPlan) -> StepResult:
        """One step, on rank 0; an empty plan only tells the followers that rank 0 is alive."""
        self.mesh.broadcast(encode(plan))
        logits = self._forward(plan)
        return StepResult([]) if logits is None else resolve(logits, plan)

    def follow(self) -> None:
        """The other ranks' loop, until rank 0 stops."""
        while (values := self.mesh.broadcast(None)) != [self.STOP]:
            self._forward(decode(values))

    def stop(self) -> None:
        """Send the followers home."""
        self.mesh.broadcast([self.STOP])

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> torch.Tensor | None:
        """Logits of the wanted rows, [R, vocab] on rank 0."""
        if not plan.tokens:
            return None
        self._steps += 1
        self.mesh.meter.on = self._steps % self._measure_every == 0
        context = PagedSequences(self.cache, plan.starts, plan.lengths, plan.block_tables, self._batch_invariant)
        hidden = self.model(torch.tensor(plan.tokens, device=self.mesh.device), context)
        if not plan.rows:
            return None
        wanted = hidden[torch.tensor(plan.rows, device=self.mesh.device)]
        logits = self.mesh.gather(self.model.logits(wanted))
        return None if logits is None else logits[:, : self.model.spec.vocab_size]
