"""Speculation's seat in the engine: before a step it gives sequences drafts, after it learns what became of them.

While drafting does not pay it is left alone, and tried again now and then, ever more rarely.
"""

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from stepladder.workers.core import Request, Sequence, StepPlan
from stepladder.workers.figures import counter, gauge, limit
from stepladder.workers.speculation.acceptance import Acceptance
from stepladder.workers.speculation.config import AUTO, REJECTION, SpeculateConfig
from stepladder.workers.speculation.drafter import KNOWN, Draft, Drafter, Verified, agreeing
from stepladder.workers.speculation.goodput import best_lengths, outcome
from stepladder.workers.speculation.pace import Pace
from stepladder.workers.speculation.payoff import Payoff
from stepladder.workers.speculation.step_time import StepTime

TRIAL = 16  # first steps, which try all lengths, one after the other
TRIED = 16  # drafted tokens that a step may verify to find out what that takes; at least one of each sequence
LOOK = 64  # steps between two that try another length while drafting pays
SHOWN = 3  # places of a draft whose acceptance is told


@dataclass
class SpeculationStats:
    """drafts: given to a step. draft_tokens, accepted_tokens: theirs. accepted_at: of these, by place in the draft.
    draft_length: of the last step's drafts, on average; 0 while drafting does not pay. drafter_guesses, drafter_right:
    tokens that weights of this version foresaw where their place was reached, and how many of these came. speculation:
    all of this, to a person."""

    drafts: int = counter("spec_decode_num_drafts", "Drafts verified.")
    draft_tokens: int = counter("spec_decode_num_draft_tokens", "Drafted tokens verified.")
    accepted_tokens: int = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
    accepted_at: list[int] = field(default_factory=list)
    draft_length: float = gauge(
        "spec_decode_draft_length", "Tokens of a draft in the last step, on average.", default=0.0, across="mean"
    )
    draft_seconds: float = counter(default=0.0)
    drafter_version: int = gauge(
        "spec_decode_drafter_version", "Of the drafter's weights; 0 without any.", across="none", each=True
    )
    drafter_guesses: int = limit()
    drafter_right: int = limit()
    speculation: str = ""


class Speculator:
    """Drafts of one engine.

    Args:
        drafter: proposes. config: how many tokens are verified, and how. stats: where it counts.

    Attributes:
        staged: weights to draft with from the next step on, in a list; any thread may put them there.
    """

    def __init__(self, drafter: Drafter, config: SpeculateConfig, stats: SpeculationStats | None = None) -> None:
        self.drafter, self.config, self.stats = drafter, config, stats or SpeculationStats()
        self.staged: deque[Any] = deque(maxlen=1)
        self.step_time, self.acceptance, self._pace = StepTime(), Acceptance(), Pace()
        self._proposed: dict[str, Draft] = {}
        self._payoff, self._trial, self._since_look = Payoff(), TRIAL, 0
        self._before: float | None = None  # seconds that drafting took for the next step; None: nobody was asked

    def draft(self, running: list[Sequence]) -> None:
        """Give drafts to those that decode."""
        self._proposed.clear()
        self.settle()
        decoding = [s for s in running if s.num_pending == 1 and not s.is_drawing]
        wanted = [s for s in decoding if s.request.params.speculate]
        asks = bool(wanted) and self._payoff.asks(len(decoding))
        for sequence in wanted:
            sequence.drafts, sequence.coupled = asks, self._is_coupled(sequence.request)
        self._before = None
        if not asks:
            return
        began = perf_counter()
        most = [min(self.config.longest, s.request.params.max_tokens - s.num_output - 1) for s in wanted]
        self.drafter.terms = self._pace.terms(self.step_time, len(decoding), sum(len(s.tokens) for s in decoding))
        drafts = self.drafter.propose(wanted, most)
        lengths = self._lengths(wanted, drafts, decoding)
        self._before = perf_counter() - began
        self.stats.draft_seconds += self._before
        for sequence, draft, length in zip(wanted, drafts, lengths, strict=True):
            if length:
                sequence.draft = tuple(draft.tokens[:length])
                self._proposed[sequence.request.id] = draft

    def settle(self) -> None:
        """Between two steps, and when there is no work: draft with what is staged from now on."""
        while self.staged:
            self._swap(self.staged.popleft())

    def observe(self, plan: StepPlan, verified: list[Verified], seconds: float) -> None:
        """A step has taken so long, and these are its sequences that drew."""
        began = perf_counter()
        self.step_time.observe(len(plan.tokens), plan.context, seconds)
        lengths = [len(one.drafted) for one in verified if one.drafted]
        self.stats.draft_length = sum(lengths) / len(lengths) if lengths else 0.0
        for one in verified:
            if not one.drafted:
                continue
            accepted = agreeing(one.drafted, one.tokens)
            draft = self._proposed.get(one.sequence.request.id)
            confidence = draft.confidence[: len(one.drafted)] if draft else [1.0] * len(one.drafted)
            self.acceptance.observe(one.sequence.request.id, confidence, accepted)
            self._count(len(one.drafted), accepted)
        self.drafter.observe(verified)
        self._tell_version()
        self.stats.speculation = self._told()
        self._pace.observe(self.step_time, plan, verified, self._before or 0.0)
        new = self.drafter.version > 0 and self.drafter.guesses < KNOWN
        if self._before is not None and verified and not self.config.k and not new:
            self._judge(plan, verified, self._before + perf_counter() - began)

    def _swap(self, weights: Any) -> None:
        """Draft with other weights, and find out what they give."""
        self.drafter.swap(weights)
        self._tell_version()
        self._payoff.forget()

    def _tell_version(self) -> None:
        stats, drafter = self.stats, self.drafter
        stats.drafter_version, stats.drafter_guesses, stats.drafter_right = (
            drafter.version,
            drafter.guesses,
            drafter.right,
        )

    def _told(self) -> str:
        stats, kind = self.stats, self.config.kind
        if not stats.drafts:
            return f"{kind}: has found nothing to draft yet"
        rates = ", ".join(f"{rate.accepted / rate.reached:.0%}" for rate in self.acceptance.positions[:SHOWN])
        accepted = (
            f"{stats.accepted_tokens / stats.drafts:.2f} of {stats.draft_tokens / stats.drafts:.2f} accepted ({rates})"
        )
        if resting := self._payoff.resting:
            return f"{kind}: off for {resting} steps, since it did not pay; {accepted}"
        return f"{kind}: {accepted}, {stats.draft_length:.1f} drafted now"

    def forget(self, sequence: Sequence) -> None:
        """It has left."""
        self.acceptance.forget(sequence.request.id)
        self.drafter.forget(sequence)

    def _is_coupled(self, request: Request) -> bool:
        """Whether its text must be plain decoding's."""
        if self.config.rule == AUTO and request.params.temperature:
            return request.seeded or bool(request.output)
        return self.config.rule != REJECTION or not request.params.temperature

    def _lengths(self, wanted: list[Sequence], drafts: list[Draft], decoding: list[Sequence]) -> list[int]:
        """How many tokens of each draft are verified."""
        whole = [len(draft.tokens) for draft in drafts]
        if self.config.k:
            return whole
        tried = max(1, TRIED // len(decoding))
        if self._trial:
            self._trial -= 1
            return [min(length, 1 + self._trial % self.config.max_k, tried) for length in whole]
        chances = [self.acceptance.of(s.request.id, d.confidence) for s, d in zip(wanted, drafts, strict=True)]
        others: list[list[float]] = [[]] * (len(decoding) - len(wanted))
        context = sum(len(s.tokens) for s in decoding)
        lengths, _ = best_lengths([*chances, *others], len(decoding), context, self.step_time)
        return self._explored(lengths[: len(wanted)], [min(length, tried) for length in whole])

    def _explored(self, lengths: list[int], others: list[int]) -> list[int]:
        """Now and then verify others, so that what it takes stays known."""
        self._since_look += 1
        if not any(lengths) or self._since_look < LOOK:
            return lengths
        self._since_look = 0
        return others

    def _judge(self, plan: StepPlan, verified: list[Verified], seconds: float) -> None:
        """By what became of the drafts, in times that are known of such steps: what is expected of the best of many is
        too good, and a single time has hiccups. seconds: that drafting took."""
        drafted, drawn = sum(len(one.drafted) for one in verified), sum(len(one.tokens) for one in verified)
        step = len(plan.tokens), plan.context, len(verified), drafted, drawn
        plain, took = outcome(self.step_time, *step)
        if alone := self.step_time(len(verified), plan.context):
            self._payoff.judge(plain / took, seconds, alone, len(verified))

    def _count(self, drafted: int, accepted: int) -> None:
        stats = self.stats
        stats.drafts += 1
        stats.draft_tokens += drafted
        stats.accepted_tokens += accepted
        stats.accepted_at += [0] * (accepted - len(stats.accepted_at))
        for place in range(accepted):
            stats.accepted_at[place] += 1
