"""A speculator that is watched: what its steps took and were expected to take, and what became of its drafts."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from stepladder.workers.core import Sequence, StepPlan
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafter import Drafter, Verified, agreeing
from stepladder.workers.speculation.goodput import outcome
from stepladder.workers.speculation.speculator import Speculator
from stepladder.workers.speculation.step_time import BUCKETS, OUTLIER, StepTime

HELD_OUT = 5  # every so many steps one is compared and not learned


class Step(NamedTuple):
    """As `outcome` takes it."""

    tokens: int
    context: int
    sequences: int
    drafted: int
    drawn: int


class Compared(NamedTuple):
    """A held-out step: where it belongs, what it was expected to take and what it took, in seconds."""

    bucket: int
    expected: float
    seconds: float


class HeldOut(StepTime):
    """Some steps are not learned from but compared, except those that it would call hiccups."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.compared = 0, list[Compared]()

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        self.seen += 1
        if self.seen % HELD_OUT or not self.knows(tokens):
            super().observe(tokens, context, seconds)
        elif seconds <= OUTLIER * (expected := self(tokens, context)):
            self.compared.append(Compared(bisect_left(BUCKETS, tokens), expected, seconds))


@dataclass
class Watch:
    """reached, accepted: drafted tokens, by place in the draft. drafting_steps: before which a drafter was asked, which
    took draft_seconds."""

    steps: list[Step] = field(default_factory=list)
    drafts: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafting_steps: int = 0
    draft_seconds: float = 0.0

    def add(self, verified: list[Verified]) -> None:
        for one in verified:
            if one.drafted:
                self.drafts += 1
                right = agreeing(one.drafted, one.tokens)
                for place in range(min(right + 1, len(one.drafted), len(one.tokens))):
                    if place == len(self.reached):
                        self.reached.append(0)
                        self.accepted.append(0)
                    self.reached[place] += 1
                    self.accepted[place] += place < right


class Watched(Speculator):
    """Attributes: watch, of what has been done since `begin`."""

    def __init__(self, drafter: Drafter, config: SpeculateConfig) -> None:
        super().__init__(drafter, config)
        self.held_out = HeldOut()
        self.step_time = self.held_out
        self.begin()

    def begin(self) -> None:
        """Forget what was watched; what was learned stays."""
        self.watch = Watch()
        self.held_out.compared.clear()

    def draft(self, running: list[Sequence]) -> None:
        before = self.stats.draft_seconds
        super().draft(running)
        took = self.stats.draft_seconds - before
        self.watch.draft_seconds += took
        self.watch.drafting_steps += took > 0

    def observe(self, plan: StepPlan, verified: list[Verified], seconds: float) -> None:
        super().observe(plan, verified, seconds)
        drafted, drawn = sum(len(one.drafted) for one in verified), sum(len(one.tokens) for one in verified)
        self.watch.steps.append(Step(len(plan.tokens), plan.context, len(verified), drafted, drawn))
        self.watch.add(verified)

    def predicted_gain(self) -> float | None:
        """Plain decoding's time over this one's, by learned step times and by what was accepted."""
        plain = spent = 0.0
        for step in self.watch.steps:
            without, took = outcome(self.step_time, *step)
            plain, spent = plain + without, spent + took
        return plain / (spent + self.watch.draft_seconds) if spent else None
