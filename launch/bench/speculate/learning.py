"""Several drafters that learn from the same texts at once, before they are measured."""

from collections.abc import Sequence as Seq

from stepladder.workers.core import Sequence
from stepladder.workers.speculation.drafter import Draft, Drafter, Verified


class Together(Drafter):
    """All propose, so that all learn how good they are; what the first one proposes is verified. Under the coupled rule
    texts are the same whoever drafts, so that each learns from what it would have seen alone."""

    def __init__(self, drafters: Seq[Drafter]) -> None:
        self.drafters, self.likely = drafters, max(drafter.likely for drafter in drafters)
        self.hidden = any(drafter.hidden for drafter in drafters)

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        first, *_ = [drafter.propose(sequences, most) for drafter in self.drafters]
        return first

    def observe(self, verified: list[Verified]) -> None:
        for drafter in self.drafters:
            drafter.observe(verified)

    def forget(self, sequence: Sequence) -> None:
        for drafter in self.drafters:
            drafter.forget(sequence)
