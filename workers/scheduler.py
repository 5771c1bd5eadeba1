"""Continuous batching: which sequences run which tokens in the next step. Pure host code: no torch, no Ray, no I/O."""

from collections import deque
from concurrent.futures import Future
from time import monotonic
from typing import NamedTuple

from stepladder.workers.blocks import BlockManager
from stepladder.workers.core import (
    Constraint,
    FinishReason,
    Output,
    Request,
    Sample,
    Score,
    Sequence,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.drafter import Verified, agreeing

__all__ = ["Scheduler", "SchedulerConfig"]


class _Part(NamedTuple):
    """A sequence's part of a step: its tokens from `start` to `stop`; whether it draws the one behind them, and whether
    it scores its prompt; tokens behind them that it verifies."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool
    scores: bool
    draft: tuple[int, ...]


class Scheduler:
    """Running sequences first, oldest first; then waiting ones while tokens, places and blocks last.

    When blocks run out, the running sequence that has most of them for itself gives them back and is recomputed later:
    whoever asks for much makes room, not those who ask for little. Never the oldest, unless it is alone, so that all
    end.
    Drafts get what tokens and blocks are left when all that is in the plan; nobody is preempted for one.

    With a lookahead, a step is planned before the one under way has been read. Sequences advance when they are planned,
    and `commit` fills in what was drawn. What a step computed for a sequence that ended meanwhile is dropped. It still
    writes behind that sequence's end, into a block that may have another owner by then. That does no harm: steps run in
    the order in which they were planned, and the new owner writes every slot before it reads it. Nor is it ever a block
    that the prefix cache knows: those are full of tokens whose steps have been committed.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size, config.cache_salt, config.prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preparing: dict[str, Future[Constraint]] = {}  # of those that wait for it before they wait for a place
        self.num_preemptions = 0
        self._planned: list[_Part] = []  # of the step that is being planned
        self._num_drawn = 0  # tokens that it draws
        self._under_way: deque[list[_Part]] = deque()
        self.verified: list[Verified] = []
        self._ended: list[Sequence] = []
        self._alive: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.preparing)

    def add(self, request: Request, constraint: Future[Constraint] | None = None) -> None:
        """Queue a request, once its constraint is ready, if it has one.

        Raises:
            ValueError: it can never be served (see `SchedulerConfig.check`), or its id is in use.
        """
        self.config.check(request)
        if request.id in self._alive:
            raise ValueError(f"a request with the id {request.id!r} is here already; give this one another id")
        self._alive[request.id] = Sequence(request)
        if constraint is None:
            self.waiting.append(self._alive[request.id])
        else:
            self.preparing[request.id] = constraint

    def abort(self, request_id: str) -> bool:
        """Forget a request; False if it is not here (any more)."""
        sequence = self._alive.get(request_id)
        if sequence is not None:
            self._end(sequence)
        return sequence is not None

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request that has not ended."""
        return self._alive.get(request_id)

    def take_prepared(self) -> list[Output]:
        """Queue those whose constraints are ready; the ends of those that cannot have theirs."""
        failed = []
        for request_id, constraint in [pair for pair in self.preparing.items() if pair[1].done()]:
            sequence, error = self._alive[request_id], constraint.exception()
            if error is None:
                del self.preparing[request_id]
                sequence.constraint = constraint.result()
                self.waiting.append(sequence)
            else:
                self._end(sequence)
                failed.append(Output(request_id, [], "abort", error=str(error)))
        return failed

    def schedule(self) -> StepPlan:
        """The next step. Unless it is empty, it is under way until its result is committed."""
        assert len(self._under_way) <= self.config.lookahead, "too many steps have not been committed"
        self._planned, self._num_drawn = [], 0
        plan = self._plan()
        if self._planned:
            self._under_way.append(self._planned)
        return plan

    def commit(self, result: StepResult) -> list[Output]:
        """Take in what the oldest step under way drew and scored."""
        outputs, drawn, scored = [], enumerate(result.tokens), iter(result.scores)
        self.verified = []
        for sequence, start, stop, samples, scores, draft in self._under_way.popleft():
            index, tokens = next(drawn) if samples else (-1, [])
            prompt_logprobs = next(scored) if scores else ()
            if self._alive.get(sequence.request.id) is not sequence:  # it has ended since
                continue
            sequence.prompt_logprobs.extend(prompt_logprobs)
            if draft and sequence.blocks:  # it has not been preempted since
                sequence.num_computed -= 1 + len(draft) - len(tokens)
                self.blocks.trim(sequence, sequence.num_computed)
            if tokens:
                outputs.append(self._extend(sequence, start, stop, tokens, draft, result.logprobs.get(index)))
                likely = result.likely[index] if result.likely else ()
                hidden = result.hidden[index] if result.hidden else None
                self.verified.append(Verified(sequence, draft, outputs[-1].tokens, likely, hidden))
            elif sequence.blocks:
                self.blocks.keep(sequence, start, stop)
        return outputs

    def take_ended(self) -> list[Sequence]:
        """Those that have left since this was asked last."""
        ended, self._ended = self._ended, []
        return ended

    def check_integrity(self) -> None:
        self.blocks.check_integrity([*self.running, *self.waiting])

    def _plan(self) -> StepPlan:
        budget, preempted, chosen = self.config.max_step_tokens, self.num_preemptions, dict[Sequence, int]()
        for sequence in list(self.running):
            if sequence in self.running:  # it may have been preempted for another one meanwhile
                chosen[sequence] = self._room_for(sequence, budget)
                budget -= chosen[sequence]
        if self.num_preemptions == preempted:  # else what was preempted waits at the front, at least one step
            budget -= self._admit(chosen, budget)
        plan = StepPlan()
        for sequence, tokens in chosen.items():
            if tokens and sequence in self.running:
                budget -= self._append(plan, sequence, tokens, budget)
        return plan

    def _admit(self, chosen: dict[Sequence, int], budget: int) -> int:
        """Waiting sequences that get a place; how many tokens they take."""
        before = budget
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
            sequence.scheduled = sequence.scheduled or monotonic()
            chosen[sequence] = tokens
            budget -= tokens
        return before - budget

    def _admits(self, sequence: Sequence) -> bool:
        """Room for its whole prompt and one block per running sequence, so that admission does not cause preemption."""
        return self.blocks.missing(sequence, len(sequence.tokens)) + len(self.running) <= self.blocks.num_free or (
            not self.running
        )

    def _room_for(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of a running sequence the step takes; it has the blocks for them then."""
        tokens = 0 if self._must_wait(sequence) else min(sequence.num_pending, budget)
        while tokens and not self.blocks.grow(sequence, sequence.num_computed + tokens):
            if self._preempt() is sequence:
                return 0
        return tokens

    def _take_draft(self, sequence: Sequence, stop: int, budget: int) -> tuple[int, ...]:
        """Of the draft of a sequence that decodes at `stop`, what tokens, blocks and its limits have room for. The last
        token that it may have is drawn, so that it need not be drafted."""
        draft, sequence.draft = sequence.draft, ()
        room = min(len(draft), budget, sequence.request.params.max_tokens - sequence.num_output - 1)
        while room > 0 and not self.blocks.grow(sequence, stop + room):
            room -= 1
        return draft[: max(0, room)]

    @staticmethod
    def _must_wait(sequence: Sequence) -> bool:
        """Whether it cannot go on before its last token is known: it ends with that one, or the next depends on it in
        ways that the host has to work out."""
        params, depends = sequence.request.params, sequence.constraint is not None
        depends = depends or params.penalises or sequence.drafts
        return sequence.is_drawing and (depends or sequence.num_output >= params.max_tokens)

    def _preempt(self) -> Sequence:
        victim = max(reversed(self.running[1:] or self.running), key=self.blocks.num_own)
        self.running.remove(victim)
        self._put_back(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    def _put_back(self, sequence: Sequence) -> None:
        """It gives back its blocks, and will begin anew."""
        self.blocks.release(sequence)
        sequence.num_computed = 0

    def _append(self, plan: StepPlan, sequence: Sequence, tokens: int, budget: int) -> int:
        """Its part of the plan; how many tokens of the budget its draft takes."""
        start, stop, first_row = sequence.num_computed, sequence.num_computed + tokens, len(plan.tokens)
        samples = stop == len(sequence.tokens)
        draft = self._take_draft(sequence, stop, budget) if samples else ()
        plan.tokens.extend((*sequence.tokens[start:stop], *draft))
        plan.starts.append(start)
        plan.lengths.append(tokens + len(draft))
        plan.block_tables.append(list(sequence.blocks))
        unscored = sequence.unscored
        if scored := range(max(start, unscored.start), min(stop, unscored.stop)):
            top = sequence.request.params.prompt_logprobs or 0
            plan.scores.append(Score(len(plan.rows), sequence.tokens[scored.start + 1 : scored.stop + 1], top))
            plan.rows.extend(range(first_row + scored.start - start, first_row + scored.stop - start))
        if samples:
            params, num_prompt = sequence.request.params, len(sequence.request.prompt)
            constraint, unending = sequence.constraint, max(0, params.min_tokens - sequence.num_output)
            barred = self.config.ends(params) if unending and not constraint else ()
            sequence.tokens.append(-1 - self._num_drawn)
            self._num_drawn += 1 + len(draft)
            row, known = len(plan.rows), sequence.tokens
            plan.samples.append(Sample(row, stop, params, known, num_prompt, barred, constraint, unending, draft,
                                       sequence.coupled))  # fmt: skip
            plan.rows.extend(range(len(plan.tokens) - 1 - len(draft), len(plan.tokens)))
        sequence.num_computed = stop + len(draft)
        self._planned.append(_Part(sequence, start, stop, samples, bool(scored), draft))
        return len(draft)

    def _extend(
        self,
        sequence: Sequence,
        start: int,
        stop: int,
        drawn: list[int],
        draft: tuple[int, ...],
        logprobs: list[TokenLogprob] | None,
    ) -> Output:
        """The sequence's tokens from `start` to `stop` have been computed, and it goes on with those drawn, until one
        of them ends it."""
        request, reason, tokens = sequence.request, None, list[int]()
        before = stop - len(request.prompt)
        for token in drawn:
            tokens.append(token)
            if reason := self._reason(sequence, before + len(tokens), token):
                break
        sequence.tokens[stop : stop + 1] = tokens
        if sequence.blocks:  # it has not been preempted since
            self.blocks.keep(sequence, start, stop + len(tokens) - 1)
        if reason:
            self._end(sequence)
        first = before == 0
        prompt_logprobs = sequence.prompt_logprobs if first and request.params.prompt_logprobs is not None else None
        begun = sequence.start() if first else None
        error = sequence.constraint.error if sequence.constraint else None
        told = logprobs and logprobs[: len(tokens)]
        accepted = agreeing(draft, tokens)
        return Output(request.id, tokens, reason, told, prompt_logprobs, begun, error, len(draft), accepted)

    def _reason(self, sequence: Sequence, count: int, token: int) -> FinishReason | None:
        """Why a sequence ends with this token, the `count`-th of its output, if it does."""
        params = sequence.request.params
        if reason := _end_by_constraint(sequence, token):
            return reason
        if count > params.min_tokens and token in self.config.ends(params):
            return "stop"
        return "length" if count >= params.max_tokens else None

    def _end(self, sequence: Sequence) -> None:
        """It leaves for good."""
        if self.preparing.pop(sequence.request.id, None) is None:
            (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence)
        del self._alive[sequence.request.id]
        self._ended.append(sequence)


def _end_by_constraint(sequence: Sequence, token: int) -> FinishReason | None:
    """Tell the sequence's constraint of its newest token; why that ended the sequence, if it did."""
    constraint = sequence.constraint
    if constraint is None:
        return None
    constraint.advance(token)
    if constraint.error:
        return "abort"
    return "stop" if constraint.ended else None
