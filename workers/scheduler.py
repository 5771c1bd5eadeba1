"""Continuous batching: which sequences run which tokens in the next step. Pure host code: no torch, no Ray, no I/O."""

from collections import deque
from dataclasses import dataclass

from workers.blocks import BlockManager
from workers.core import FinishReason, Output, Request, Sample, Sequence, StepPlan, StepResult


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine.

    Attributes:
        max_sequences: how many sequences run at once.
        max_step_tokens: tokens of one step; a longer prompt is prefilled in chunks of what is left of it.
        max_model_len: prompt and output together.
        num_blocks, block_size: the KV cache.
        eos_ids: tokens that end a sequence.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    max_model_len: int = 2048
    num_blocks: int = 1024
    block_size: int = 16
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "max_model_len", "num_blocks", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_step_tokens < self.max_sequences:
            raise ValueError(
                f"engine.max_step_tokens ({self.max_step_tokens}) must be at least engine.max_sequences "
                f"({self.max_sequences}), so that every running sequence can decode"
            )
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"the KV cache holds {self.num_blocks * self.block_size} tokens, fewer than one sequence of "
                f"max_model_len ({self.max_model_len}); raise kv.num_blocks or lower engine.max_model_len"
            )


class Scheduler:
    """Running sequences first, oldest first; then waiting ones while tokens, places and blocks last.

    When blocks run out, the youngest running sequence gives its blocks back and is recomputed later.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._planned: list[tuple[Sequence, int, bool]] = []  # sequence, tokens in this step, whether it samples

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it cannot fit into max_model_len, or it is a replay of a request that was complete.
        """
        length = len(request.prompt) + request.params.max_tokens
        if length > self.config.max_model_len:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.params.max_tokens}; together "
                f"they exceed this model's context of {self.config.max_model_len} tokens"
            )
        if len(request.output) >= request.params.max_tokens:
            raise ValueError(
                f"nothing is left to generate: {len(request.output)} of its {request.params.max_tokens} output tokens "
                f"are there already"
            )
        self.waiting.append(Sequence(request))

    def abort(self, request_id: str) -> bool:
        """Forget a request; False if it is not here (any more)."""
        for queue in (self.waiting, self.running):
            for sequence in queue:
                if sequence.request.id == request_id:
                    queue.remove(sequence)
                    self.blocks.release(sequence)
                    return True
        return False

    def schedule(self) -> StepPlan:
        """The next step; its result must be committed before the next call."""
        self._planned.clear()
        plan, budget, preempted = StepPlan(), self.config.max_step_tokens, self.num_preemptions
        for sequence in list(self.running):
            if sequence in self.running:  # it may have been preempted for an older one meanwhile
                budget -= self._plan_running(plan, sequence, budget)
        if self.num_preemptions > preempted:  # no blocks: what was preempted waits at the front, at least one step
            return plan
        while self.waiting and budget and len(self.running) < self.config.max_sequences:
            sequence = self.waiting[0]
            tokens = min(sequence.num_pending, budget)
            if not self._admits(sequence) or not self.blocks.grow(sequence, tokens):
                break
            self.running.append(self.waiting.popleft())
            self._append(plan, sequence, tokens)
            budget -= tokens
        return plan

    def commit(self, result: StepResult) -> list[Output]:
        """Take in what the planned step drew; aborted sequences are skipped."""
        outputs, drawn = [], iter(result.tokens)
        for sequence, tokens, samples in self._planned:
            token = next(drawn) if samples else None
            if not sequence.blocks:  # aborted while the step ran
                continue
            sequence.num_computed += tokens
            if token is not None:
                outputs.append(self._extend(sequence, token))
        self._planned.clear()
        return outputs

    def check_integrity(self) -> None:
        self.blocks.check_integrity([*self.running, *self.waiting])

    def _admits(self, sequence: Sequence) -> bool:
        """Room for its whole prompt and one block per running sequence, so that admission does not cause preemption."""
        return self.blocks.missing(sequence, len(sequence.tokens)) + len(self.running) <= self.blocks.num_free or (
            not self.running
        )

    def _plan_running(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        tokens = min(sequence.num_pending, budget)
        while tokens and not self.blocks.grow(sequence, sequence.num_computed + tokens):
            if self._preempt_youngest() is sequence:
                return 0
        if tokens:
            self._append(plan, sequence, tokens)
        return tokens

    def _preempt_youngest(self) -> Sequence:
        victim = self.running.pop()
        self.blocks.release(victim)
        victim.num_computed = 0
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    def _append(self, plan: StepPlan, sequence: Sequence, tokens: int) -> None:
        start, stop = sequence.num_computed, sequence.num_computed + tokens
        plan.tokens.extend(sequence.tokens[start:stop])
        plan.starts.append(start)
        plan.lengths.append(tokens)
        plan.block_tables.append(list(sequence.blocks))
        samples = stop == len(sequence.tokens)
        if samples:
            p = sequence.request.params
            plan.samples.append(Sample(len(plan.tokens) - 1, stop, p.seed, p.temperature, p.top_p))
        self._planned.append((sequence, tokens, samples))

    def _extend(self, sequence: Sequence, token: int) -> Output:
        sequence.tokens.append(token)
        params = sequence.request.params
        reason: FinishReason | None = None
        if token in self.config.eos_ids and not params.ignore_eos:
            reason = "stop"
        elif sequence.num_output >= params.max_tokens:
            reason = "length"
        if reason:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        return Output(sequence.request.id, [token], reason)
