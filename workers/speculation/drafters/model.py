"""A smaller model of the same tokenizer drafts: a model and a KV cache of its own, all sequences of a step together."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import exp
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from stepladder.workers.blocks import BlockManager
from stepladder.workers.core import Sample, Sequence, StepPlan
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.drafter import Draft, Drafter, OpenDraft, Verified
from stepladder.workers.speculation.price import Price

__all__ = ["ModelDrafter", "Runner"]


class Runner(Protocol):
    """An executor, as far as it is needed here: runs a plan over a cache; `result()` of what that returns is a
    StepResult."""

    def submit(self, plan: StepPlan) -> Any: ...


@dataclass
class _State:
    """Of one sequence: `shadow` holds blocks of this cache; `ran` are the tokens whose keys and values are in them, of
    which the first `right` are known to be the sequence's own."""

    shadow: Sequence
    ran: list[int]
    right: int = 0


class _Part(NamedTuple):
    """Tokens of the sequence at `place` for a step; if they are all that is missing, the next one is drawn."""

    place: int
    tokens: list[int]
    is_whole: bool


class ModelDrafter(Drafter):
    """Draws from its own model with the request's parameters and noise: where the two models agree on the likely
    tokens, the same noise picks the same one (Daliri et al. 2408.07978), so that drafts are right at any temperature.

    It drafts where its cache has room; a token's confidence is its probability. Of a prompt that is longer than a step
    it runs one step's part each time that it is asked, and drafts nothing until it has caught up.

    Args:
        executor: of the smaller model, with a cache. limits: of the cache, and how many tokens a step may have.
        threshold: a draft ends where it would be right with less than this probability; None: where it does not pay.
    """

    def __init__(self, executor: Runner, limits: SchedulerConfig, threshold: float | None = None) -> None:
        self.executor, self.limits, self.price = executor, limits, Price(threshold)
        self.blocks = BlockManager(limits.num_blocks, limits.block_size, caching=False)
        self.states: dict[str, _State] = {}

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        under_way = [OpenDraft(limit, self.price.least, self.version) for limit in most]
        drafts = [each.made for each in under_way]
        going = [i for i, limit in enumerate(most) if limit > 0 and self.price.pays(self.terms)]
        while going:
            step, budget = list[_Part](), self.limits.max_step_tokens
            for i in going:
                pending = self._pending(sequences[i], drafts[i].tokens)
                if part := pending[:budget]:
                    step.append(_Part(i, part, len(part) == len(pending)))
                    budget -= len(part)
            if not step:
                break
            began = perf_counter()
            drawn = list(self._run(sequences, drafts, step))
            if drawn and len(drawn) == sum(len(part.tokens) for part in step):  # nobody had to catch up
                self.price.paid(perf_counter() - began, (sure for _, _, sure in drawn))
            open_ones = [(i, under_way[i]) for i, token, sure in drawn if under_way[i].take(token, sure)]
            going = [i for i, draft in open_ones if self.price.pays(self.terms, draft.chance)]
        return drafts

    def observe(self, verified: list[Verified]) -> None:
        """Nothing: what was rejected is seen when the sequence comes again."""

    def forget(self, sequence: Sequence) -> None:
        if state := self.states.pop(sequence.request.id, None):
            self.blocks.release(state.shadow)

    def _pending(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """Tokens to run before the next one can be drawn; none if the cache or the model has no room for them."""
        state = self.states.get(sequence.request.id)
        if state is None:
            state = self.states[sequence.request.id] = _State(Sequence(sequence.request), [])
        held, known = len(sequence.tokens), sequence.tokens
        right = next((i for i in range(state.right, min(len(state.ran), held)) if state.ran[i] != known[i]), None)
        if right is None:  # what is drafted now was run as it stands
            right = min(len(state.ran), held + len(draft))
        del state.ran[min(right, held + len(draft) - 1) :]
        state.right = min(len(state.ran), held)
        fits = held + len(draft) <= self.limits.max_model_len
        if not fits or not self.blocks.grow(state.shadow, held + len(draft)):
            return []
        start = len(state.ran)
        return [*known[start:], *draft[max(0, start - held) :]]

    def _run(
        self, sequences: list[Sequence], drafts: list[Draft], step: list[_Part]
    ) -> Iterator[tuple[int, int, float]]:
        """For each that has caught up its index, the next token, and how likely that is."""
        plan = StepPlan()
        for i, tokens, _ in step:
            state = self.states[sequences[i].request.id]
            plan.starts.append(len(state.ran))
            plan.lengths.append(len(tokens))
            plan.block_tables.append(list(state.shadow.blocks))
            plan.tokens.extend(tokens)
            state.ran.extend(tokens)
        ends, ready = accumulate(plan.lengths), [part.place for part in step if part.is_whole]
        plan.rows.extend(end - 1 for end, part in zip(ends, step, strict=True) if part.is_whole)
        for row, i in enumerate(ready):
            request, known, draft = sequences[i].request, sequences[i].tokens, drafts[i].tokens
            position, params = len(known) + len(draft), replace(request.params, logprobs=0)
            history = [*known, *draft] if params.penalises else known  # nobody else looks at it
            plan.samples.append(Sample(row, position, params, history, len(request.prompt)))
        result = self.executor.submit(plan).result()
        for nth, (i, drawn) in enumerate(zip(ready, result.tokens, strict=True)):
            yield i, drawn[0], exp(result.logprobs[nth][0].logprob)
