"""Continuous batching: which sequences run which tokens in the next step. Pure host code: no torch, no Ray, no I/O."""

from collections import deque
from typing import NamedTuple

from workers.blocks import BlockManager
from workers.core import (
    FinishReason,
    Output,
    Request,
    Sample,
    SamplingParams,
    Score,
    Sequence,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from workers.limits import SchedulerConfig

__all__ = ["Scheduler", "SchedulerConfig"]


class _Planned(NamedTuple):
    """A sequence's part of the step under way: how many tokens, and whether it draws one or scores its prompt."""

    sequence: Sequence
    tokens: int
    samples: bool
    scores: bool


class Scheduler:
    """Running sequences first, oldest first; then waiting ones while tokens, places and blocks last.

    When blocks run out, the youngest running sequence gives its blocks back and is recomputed later.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size, config.cache_salt, config.prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._planned: list[_Planned] = []
        self._ids: set[str] = set()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never be served (see `SchedulerConfig.check`), or its id is in use.
        """
        self.config.check(request)
        if request.id in self._ids:
            raise ValueError(f"a request with the id {request.id!r} is here already; give this one another id")
        self._ids.add(request.id)
        self.waiting.append(Sequence(request))

    def abort(self, request_id: str) -> bool:
        """Forget a request; False if it is not here (any more)."""
        for queue in (self.waiting, self.running):
            for sequence in queue:
                if sequence.request.id == request_id:
                    queue.remove(sequence)
                    self._release(sequence)
                    return True
        return False

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request that has not ended."""
        return next((s for s in (*self.running, *self.waiting) if s.request.id == request_id), None)

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
            if not len(sequence.unscored):  # the logits of a prompt that is to be scored are needed
                self.blocks.reuse(sequence)
            tokens = min(sequence.num_pending, budget)
            if not self._admits(sequence) or not self.blocks.grow(sequence, sequence.num_computed + tokens):
                self._put_back(sequence)
                break
            self.blocks.count_lookup(sequence)
            self.running.append(self.waiting.popleft())
            self._append(plan, sequence, tokens)
            budget -= tokens
        return plan

    def commit(self, result: StepResult) -> list[Output]:
        """Take in what the planned step drew and scored; aborted sequences are skipped."""
        outputs, drawn, scored = [], enumerate(result.tokens), iter(result.scores)
        for sequence, tokens, samples, scores in self._planned:
            index, token = next(drawn) if samples else (-1, None)
            prompt_logprobs = next(scored) if scores else ()
            if not sequence.blocks:  # aborted while the step ran
                continue
            sequence.num_computed += tokens
            self.blocks.keep(sequence, sequence.num_computed - tokens)
            sequence.prompt_logprobs.extend(prompt_logprobs)
            if token is not None:
                outputs.append(self._extend(sequence, token, result.logprobs.get(index)))
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
        self._put_back(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    def _put_back(self, sequence: Sequence) -> None:
        """It gives back its blocks, and will begin anew."""
        self.blocks.release(sequence)
        sequence.num_computed = 0

    def _append(self, plan: StepPlan, sequence: Sequence, tokens: int) -> None:
        start, stop, first_row = sequence.num_computed, sequence.num_computed + tokens, len(plan.tokens)
        plan.tokens.extend(sequence.tokens[start:stop])
        plan.starts.append(start)
        plan.lengths.append(tokens)
        plan.block_tables.append(list(sequence.blocks))
        unscored = sequence.unscored
        if scored := range(max(start, unscored.start), min(stop, unscored.stop)):
            top = sequence.request.params.prompt_logprobs or 0
            plan.scores.append(Score(len(plan.rows), sequence.tokens[scored.start + 1 : scored.stop + 1], top))
            plan.rows.extend(range(first_row + scored.start - start, first_row + scored.stop - start))
        if samples := stop == len(sequence.tokens):
            params, num_prompt = sequence.request.params, len(sequence.request.prompt)
            barred = self._ends(params) if sequence.num_output < params.min_tokens else ()
            plan.samples.append(Sample(len(plan.rows), stop, params, sequence.tokens, num_prompt, barred))
            plan.rows.append(len(plan.tokens) - 1)
        self._planned.append(_Planned(sequence, tokens, samples, bool(scored)))

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        return params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self.config.eos_ids)

    def _extend(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        request, first = sequence.request, not sequence.num_output
        params = request.params
        sequence.tokens.append(token)
        reason: FinishReason | None = None
        if sequence.num_output > params.min_tokens and token in self._ends(params):
            reason = "stop"
        elif sequence.num_output >= params.max_tokens:
            reason = "length"
        if reason:
            self.running.remove(sequence)
            self._release(sequence)
        prompt_logprobs = sequence.prompt_logprobs if first and params.prompt_logprobs is not None else None
        cached = sequence.num_cached if first else 0
        return Output(request.id, [token], reason, [logprob] if logprob else None, prompt_logprobs, cached)

    def _release(self, sequence: Sequence) -> None:
        """A sequence leaves for good."""
        self.blocks.release(sequence)
        self._ids.discard(sequence.request.id)
