"""What a drafter is: it guesses how sequences go on, and is told how they did. Pure host code."""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from stepladder.workers.core import Sequence
from stepladder.workers.speculation.price import Terms

__all__ = ["KNOWN", "Draft", "Drafter", "OpenDraft", "Verified", "agreeing"]

KNOWN = 1000  # guesses that new weights make whatever they cost: whoever judges a version needs them


class Draft(NamedTuple):
    """What is proposed for one sequence.

    Attributes:
        tokens: up to as many as were asked for, perhaps none.
        confidence: of each token, the drafter's own estimate that it is right given those before it, 0 to 1.
        version: of the drafter that proposed.
    """

    tokens: list[int]
    confidence: list[float]
    version: int = 0


class OpenDraft:
    """A draft under way: it ends where all of it would be right with less than a probability.

    Args:
        most: tokens that it may have. threshold: that probability. version: of the drafter.
    """

    def __init__(self, most: int, threshold: float, version: int = 0) -> None:
        self.made, self.most, self.threshold = Draft([], [], version), most, threshold
        self.chance = 1.0  # that all of it is right

    def take(self, token: int, sure: float) -> bool:
        """Go on with a token that is right with probability `sure` if all before it are. False: the draft has ended,
        with it or before it."""
        self.chance *= sure
        if self.chance < self.threshold or len(self.made.tokens) >= self.most:
            return False
        self.made.tokens.append(token)
        self.made.confidence.append(sure)
        return len(self.made.tokens) < self.most


class Verified(NamedTuple):
    """What a step did for a sequence.

    Attributes:
        sequence: its tokens end with `tokens`.
        drafted: the tokens that the step verified; perhaps none.
        tokens: what it went on with: those of `drafted` that were accepted, and one more. Fewer, if it ended there.
        likely: for each row of the verification the likeliest next tokens, best first, if the drafter asks for them
            (`Drafter.likely`). Row 0 follows the token before `drafted`, row 1 + i follows `drafted[i]`.
        hidden: the model's final hidden states at those rows, a tensor [1 + drafted, hidden] on its device, if the
            drafter asks for them (`Drafter.hidden`).
    """

    sequence: Sequence
    drafted: Seq[int]
    tokens: Seq[int]
    likely: Seq[Seq[int]] = ()
    hidden: Any = None


def agreeing(drafted: Seq[int], tokens: Seq[int]) -> int:
    """How many drafted tokens, from the first on, are those that the sequence went on with."""
    return next(
        (i for i, (a, b) in enumerate(zip(drafted, tokens, strict=False)) if a != b), min(len(drafted), len(tokens))
    )


class Drafter(ABC):
    """Proposes tokens that may follow; a wrong one costs time, never a wrong text.

    A sequence is known by its request's id from when it is first seen, which may be at any length of it, until it is
    forgotten. Meanwhile its tokens only get more.

    Attributes:
        likely: how many of the likeliest tokens per row it wants to be told (`Verified.likely`).
        hidden: whether it wants to be told hidden states (`Verified.hidden`).
        version: of its weights, if it has some that change; 0 before it has any.
        guesses, right: tokens that these weights foresaw where their place was reached, and how many of these came.
        terms: what the engine's time is worth, for those that take some of it.
    """

    likely: int = 0
    hidden: bool = False
    version: int = 0
    guesses: int = 0
    right: int = 0
    terms: Terms = Terms()

    @abstractmethod
    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        """For each sequence at most `most[i]` tokens to follow those it has; none if `most[i]` is 0, or if a step under
        way draws its last one."""

    @abstractmethod
    def observe(self, verified: list[Verified]) -> None:
        """What the last step did; after each one."""

    @abstractmethod
    def forget(self, sequence: Sequence) -> None:
        """It has ended or was aborted; one that was never seen is no error."""

    def swap(self, weights: Any) -> None:
        """Draft with other weights from now on, between two steps; of those drafters that have some that change. None:
        with none."""
        raise AssertionError(f"{type(self).__name__} has no weights that change")
