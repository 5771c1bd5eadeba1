"""When drafting rests, and when it must not."""

from stepladder.workers.core import Request, SamplingParams, Sequence, StepPlan
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafter import Draft, Drafter, Verified
from stepladder.workers.speculation.speculator import KNOWN, Speculator

PLAIN = 1e-7  # seconds of a step: next to nothing, beside which no drafting pays


class Wrong(Drafter):
    """Its tokens never come."""

    def __init__(self, version: int) -> None:
        self.version = version

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        return [Draft([5], [0.9], self.version) for _ in sequences]

    def observe(self, verified: list[Verified]) -> None:
        self.guesses += len(verified)

    def forget(self, sequence: Sequence) -> None:
        pass

    def swap(self, weights: int) -> None:
        self.version, self.guesses = weights, 0


def steps_with_drafts(speculator: Speculator, steps: int) -> int:
    sequence, count = Sequence(Request(id="a", prompt=(1, 2, 3), params=SamplingParams(max_tokens=10_000))), 0
    for _ in range(steps):
        sequence.num_computed = len(sequence.tokens) - 1
        sequence.drafts, sequence.draft = False, ()
        speculator.draft([sequence])
        count += sequence.drafts
        rows = 1 + len(sequence.draft)
        plan = StepPlan([0] * rows, [sequence.num_computed], [rows], [[0]])
        drafted, sequence.draft = sequence.draft, ()
        sequence.tokens.append(9)
        speculator.observe(plan, [Verified(sequence, drafted, [9])], PLAIN * rows)
    return count


def test_what_does_not_pay_rests() -> None:
    assert steps_with_drafts(Speculator(Wrong(0), SpeculateConfig(kind="ngram")), KNOWN) < KNOWN / 4


def test_new_weights_are_drafted_with_until_somebody_can_judge_them() -> None:
    """A version that is worse would else rest, and never be found out."""
    drafter = Wrong(3)
    speculator = Speculator(drafter, SpeculateConfig(kind="ngram"))
    assert steps_with_drafts(speculator, KNOWN) == KNOWN == drafter.guesses
    assert steps_with_drafts(speculator, KNOWN) < KNOWN / 4, "what is known rests as any other"
    speculator.staged.append(4)
    assert steps_with_drafts(speculator, KNOWN) == KNOWN and drafter.version == 4
