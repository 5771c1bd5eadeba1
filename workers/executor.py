"""Runs StepPlans on one rank: rank 0 leads (broadcasts the plan, samples), the other ranks follow."""

import torch
from torch import Tensor

from stepladder.kernels.cpu.native import computing
from stepladder.kernels.transfer import upload
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.workers.codec import PlanCodec
from stepladder.workers.core import Sample, SamplingParams, StepPlan
from stepladder.workers.forward import Forward
from stepladder.workers.sampler import Drawn, Rows, draw

# the sampler copies the logits for each of these
_ALL_COPIES = SamplingParams(min_p=0.01, top_k=50, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=1)


class Executor:
    """One rank's KV cache, and what is drawn from the hidden states that `forward` computes.

    On CUDA steps are queued: nothing on the way from a plan to its tokens waits for the device, only reading them does.

    Args:
        forward: the model. mesh: this rank's group. `allocate` comes before the first step.

    Attributes:
        likely: how many of the likeliest tokens of each drawn row somebody wants to be told. hidden: whether somebody
            wants its hidden state.
    """

    STOP = -1  # as the only integer of a broadcast: leave the loop

    def __init__(self, forward: Forward, mesh: Mesh) -> None:
        self.forward, self.mesh, self._plans = forward, mesh, PlanCodec()
        self.likely, self.hidden = 0, False
        self._nothing = torch.zeros(0, dtype=torch.int64, device=mesh.device)
        self._last_drawn = self._nothing

    @property
    def model(self) -> Transformer:
        return self.forward.model

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the KV cache; equal on every rank, and before the first step."""
        self.cache = self.model.cache(num_blocks + self.forward.spare_blocks, block_size)
        self.forward.begin(self.cache)

    def warm_up(self, tokens: int, sequences: int, block_size: int) -> None:
        """Large steps, so that what they and the libraries allocate on the way has been allocated. Every rank.

        A prefill of `tokens`, and a decode step of all sequences, each with that prefill as its context: the same
        blocks serve all, since nobody looks at the result. Of both, all logits are gathered and drawn from.
        """
        blocks, count = -(-tokens // block_size), min(sequences, tokens)
        cache = self.model.cache(blocks, block_size)
        samples = [Sample(row, tokens, _ALL_COPIES, [0] * tokens, 1) for row in range(count)]
        for starts, lengths in (([0], [tokens]), ([tokens - 1] * count, [1] * count)):
            ids = torch.zeros(sum(lengths), dtype=torch.int64, device=self.mesh.device)
            plan = StepPlan([0] * len(ids), starts, lengths, [list(range(blocks))] * len(starts))
            with computing(self.model.native):
                logits = self._logits(self.forward.alone(plan, ids, cache)[-count:])
                if logits is not None:
                    draw(logits, StepPlan(samples=samples))

    def submit(self, plan: StepPlan) -> Drawn:
        """Queue one step, on rank 0; an empty plan only says that there is nothing to do, but rank 0 is alive."""
        if self.mesh.shard.size > 1:
            self.mesh.broadcast(self._plans.encode(plan))
        with computing(self.model.native):
            hidden, logits = self._forward(plan)
            if logits is None:
                return Drawn(plan, Rows(self._nothing), [], None)
            drawn = draw(logits, plan, self.likely, hidden if self.hidden else None, self.model.native)
        self._last_drawn = drawn.tokens
        return drawn

    def follow(self) -> None:
        """The other ranks' loop, until rank 0 stops. Waiting for a plan is being idle if the last one was empty."""
        clock, plan = self.mesh.clock, StepPlan()
        while True:
            with clock.waiting if plan.tokens else clock.idle:
                values = self.mesh.broadcast(None)
            if values == [self.STOP]:
                return
            plan = self._plans.decode(values)
            with computing(self.model.native):
                self._forward(plan)

    def stop(self) -> None:
        """There will be no more steps; send the followers home."""
        self.forward.stop()
        if self.mesh.shard.size > 1:
            self.mesh.broadcast([self.STOP])

    def _forward(self, plan: StepPlan) -> tuple[Tensor | None, Tensor | None]:
        """Final hidden states of the wanted rows [R, hidden], and on rank 0 their logits [R, vocab]."""
        if not plan.tokens:
            self.forward.idle()
            return None, None
        hidden = self.forward.run(plan, self._known(plan.tokens))
        return hidden, self._logits(hidden) if plan.rows else None

    def _logits(self, hidden: Tensor) -> Tensor | None:
        gathered = self.mesh.gather(self.model.logits(hidden))
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
