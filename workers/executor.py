"""Runs StepPlans on one rank: rank 0 leads (broadcasts the plan, samples), the other ranks follow."""

import torch
from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.pack import pack_weights
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.codec import decode, encode
from stepladder.workers.core import Sample, SamplingParams, StepPlan
from stepladder.workers.graphs import Capture, DecodeGraphs
from stepladder.workers.sampler import Drawn, draw

# the sampler copies the logits for each of these
_ALL_COPIES = SamplingParams(min_p=0.01, top_k=50, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=1)


class Executor:
    """One rank's model and KV cache.

    On CUDA steps are queued: nothing on the way from a plan to its tokens waits for the device, only reading them does.

    Args:
        spec, path: the checkpoint.
        mesh: this rank's group.
        num_blocks, block_size: the KV cache, as in `allocate`; without blocks that is called later.
        measure_every: on CPU, reduces of every n-th step are time-stamped.
        batch_invariant: round every row alike in any batch. The mesh must then be an `ordered` one.
        capture: records decode steps, so that they are launched as one; None launches every kernel by itself.
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
        capture: Capture | None = None,
    ) -> None:
        self.mesh, self._measure_every, self._steps = mesh, measure_every, 0
        self._measures = mesh.device.type == "cpu"  # the stamps are the host's, which on CUDA is far ahead
        self._batch_invariant, self._capture = batch_invariant, capture
        self._nothing = torch.zeros(0, dtype=torch.int64, device=mesh.device)
        self._last_drawn = self._nothing
        with torch.device(mesh.device):
            self.model = Transformer(spec, mesh.shard, mesh.all_reduce).requires_grad_(False)
        load_weights(self.model, path)
        pack_weights(self.model, batch_invariant)
        assert not (batch_invariant and capture), "graphs round as the batch has it"
        if num_blocks:
            self.allocate(num_blocks, block_size)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the KV cache; equal on every rank, and before the first step."""
        spare = 1 if self._capture else 0
        spec, kv_heads = self.model.spec, self.model.num_kv_heads
        self.cache = KVCache(spec, kv_heads, num_blocks + spare, block_size, self.mesh.device)
        self._graphs = DecodeGraphs(self.model, self.cache, self._capture) if self._capture else None

    @torch.inference_mode()
    def warm_up(self, tokens: int, sequences: int, block_size: int) -> None:
        """Large steps, so that what they and the libraries allocate on the way has been allocated. Every rank.

        A prefill of `tokens`, and a decode step of all sequences, each with that prefill as its context: the same
        blocks serve all, since nobody looks at the result. Of both, all logits are gathered and drawn from.
        """
        blocks, count = -(-tokens // block_size), min(sequences, tokens)
        cache = KVCache(self.model.spec, self.model.num_kv_heads, blocks, block_size, self.mesh.device)
        samples = [Sample(row, tokens, _ALL_COPIES, [0] * tokens, 1) for row in range(count)]
        for starts, lengths in (([0], [tokens]), ([tokens - 1] * count, [1] * count)):
            ids = torch.zeros(sum(lengths), dtype=torch.int64, device=self.mesh.device)
            tables = [list(range(blocks))] * len(starts)
            hidden = self.model(ids, PagedSequences(cache, starts, lengths, tables, self._batch_invariant))
            logits = self.mesh.gather(self.model.logits(hidden[-count:]))
            if logits is not None:
                draw(logits[:, : self.model.spec.vocab_size], StepPlan(samples=samples))

    def submit(self, plan: StepPlan) -> Drawn:
        """Queue one step, on rank 0; an empty plan only tells the followers that rank 0 is alive."""
        self.mesh.broadcast(encode(plan))
        logits = self._forward(plan)
        if logits is None:
            return Drawn(plan, self._nothing, [], None)
        drawn = draw(logits, plan)
        self._last_drawn = drawn.tokens
        return drawn

    def follow(self) -> None:
        """The other ranks' loop, until rank 0 stops."""
        while (values := self.mesh.broadcast(None)) != [self.STOP]:
            self._forward(decode(values))

    def stop(self) -> None:
        """Send the followers home."""
        self.mesh.broadcast([self.STOP])

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> Tensor | None:
        """Logits of the wanted rows, [R, vocab] on rank 0."""
        if not plan.tokens:
            return None
        self._steps += 1
        tokens = self._known(plan.tokens)
        if self._graphs and self._graphs.fits(plan):
            self.mesh.meter.on = False
            logits = self._graphs.run(tokens, plan)
        else:
            self.mesh.meter.on = self._measures and self._steps % self._measure_every == 0
            context = PagedSequences(self.cache, plan.starts, plan.lengths, plan.block_tables, self._batch_invariant)
            hidden = self.model(tokens, context)
            if not plan.rows:
                return None
            logits = self.model.logits(hidden[upload(plan.rows, self.mesh.device)])
        gathered = self.mesh.gather(logits)
        return None if gathered is None else gathered[:, : self.model.spec.vocab_size]

    def _known(self, tokens: list[int]) -> Tensor:
        """A plan's tokens on the device, those that the last step draws filled in: from rank 0, which draws them."""
        given, missing = upload(tokens, self.mesh.device), -min(tokens)
        if missing <= 0:
            return given
        if self.mesh.shard.rank:
            self._last_drawn = given.new_empty(missing)
        drawn = self.mesh.share(self._last_drawn[:missing])
        return torch.where(given < 0, drawn[(-1 - given).clamp_min(0)], given)
