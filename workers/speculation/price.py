"""When it pays to draft one more token: what that takes, against what it saves."""

from collections import deque
from collections.abc import Iterable
from math import inf
from statistics import median
from typing import NamedTuple

__all__ = ["COSTLY", "FREE", "SURE", "Price", "Terms"]

FREE = 0.05  # a draft ends where all of it would be right with less than this probability
COSTLY = 0.25  # the same, where that is all there is to go by
SURE = 0.75  # a token that is known so well needs no second opinion, as long as nothing is weighed
BANDS = 20  # of probabilities, in which it is counted how sure drafted tokens were
MEMORY = 256  # tokens after which an old one counts 1 / e
RECENT = 15  # rounds whose median is what drafting takes
TRIED = 64  # times that it did not pay, and is tried again


class Terms(NamedTuple):
    """What an engine's time is worth now.

    Attributes:
        token: seconds that it takes per token; a token that was drafted right saves as much. inf: not known yet.
        verifying: seconds by which a step is longer for each drafted token.
    """

    token: float = inf
    verifying: float = 0.0


class Price:
    """Of tokens that take time to draft. The rate of tokens per second is highest if one more is drafted exactly where
    it is expected to save more than it takes (the renewal-reward theorem).

    Args:
        threshold: nothing is weighed; a draft ends where all of it would be right with less than this probability.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold
        self._seconds: deque[float] = deque(maxlen=RECENT)  # per draft and token
        self._sure = [0.0] * BANDS
        self._refused = 0

    @property
    def least(self) -> float:
        """The probability where a draft ends whatever drafting takes."""
        return FREE if self.threshold is None else self.threshold

    def pays(self, terms: Terms | None, chance: float = 1.0, than: float = 0.0) -> bool:
        """Whether to draft a token behind a draft that is right with probability `chance`, if there is already one to
        go on with that is right with probability `than`. terms: None does not weigh."""
        if chance < self.least:
            return False
        if self.threshold is not None or terms is None or not self._seconds:
            return than < SURE and (self.threshold is not None or chance >= COSTLY)
        takes = median(self._seconds) + (0.0 if than else chance * self.better() * terms.verifying)
        if chance * self.better(than) * terms.token > takes:
            return True
        self._refused += 1
        return self._refused % TRIED == 0

    def better(self, than: float = 0.0) -> float:
        """By how much a drafted token is expected to be likelier right than one of this probability."""
        gained = sum(seen * max(0.0, (band + 0.5) / BANDS - than) for band, seen in enumerate(self._sure) if seen)
        return gained / max(1e-9, sum(self._sure))

    def paid(self, seconds: float, sure: Iterable[float]) -> None:
        """One token has been drafted for some drafts at once, with these probabilities."""
        found = list(sure)
        self._seconds.append(seconds / len(found))
        keep = 1 - len(found) / MEMORY
        self._sure = [seen * keep for seen in self._sure]
        for one in found:
            self._sure[min(int(one * BANDS), BANDS - 1)] += 1
