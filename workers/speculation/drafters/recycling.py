"""Token Recycling (Luo et al. 2408.08696): what the model thought of is kept, and proposed the next time."""

from array import array
from collections.abc import Sequence as Seq

from stepladder.workers.core import Sequence
from stepladder.workers.params import check
from stepladder.workers.speculation.drafter import Draft, Drafter, OpenDraft, Verified
from stepladder.workers.speculation.drafters.calibration import Calibration

__all__ = ["Recycling"]

UNKNOWN = -1
ESTIMATE = 0.2  # of a token, before it has been seen how often the next one was foreseen


class Recycling(Drafter):
    """For each token of the vocabulary, the one that the model last held the likeliest behind it, whatever was drawn; a
    draft is a chain of these. Rows behind rejected tokens teach it as well.

    The paper keeps eight candidates and has a tree of them verified; a chain needs only the first. Of each token it is
    counted how often its successor was foreseen: that is the confidence.

    Args:
        vocab_size: tokens that exist; about 70 bytes each.
        threshold: a draft ends where it would be right with less than this probability.
    """

    likely = 1

    def __init__(self, vocab_size: int, threshold: float = 0.05) -> None:
        check(vocab_size > 0, f"a vocabulary of {vocab_size} tokens; it must have at least one")
        check(0 <= threshold <= 1, f"a drafter's threshold is {threshold}; it is a probability, from 0 to 1")
        self.threshold = threshold
        self.successors = array("i", [UNKNOWN]) * vocab_size
        self.calibration = Calibration([ESTIMATE] * vocab_size, prior=4)

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        return [
            self._chain(sequence.tokens[-1], 0 if sequence.is_drawing else limit)
            for sequence, limit in zip(sequences, most, strict=True)
        ]

    def observe(self, verified: list[Verified]) -> None:
        for each in verified:
            if not each.sequence.request.learn:
                continue
            before = each.sequence.tokens[-1 - len(each.tokens)]
            self._learn([before, *each.tokens[:-1]], each.tokens)
            for token, likely in zip([before, *each.drafted], each.likely, strict=False):
                self.successors[token] = likely[0]

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept of a sequence by itself."""

    def _learn(self, tokens: Seq[int], came: Seq[int]) -> None:
        for token, successor in zip(tokens, came, strict=True):
            if self.successors[token] != UNKNOWN:
                self.calibration.learn(token, self.successors[token] == successor)

    def _chain(self, token: int, most: int) -> Draft:
        draft = OpenDraft(most, self.threshold, self.version)
        while (successor := self.successors[token]) != UNKNOWN and draft.take(successor, self.calibration.rates[token]):
            token = successor
        return draft.made
