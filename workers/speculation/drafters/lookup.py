"""What drafters have in common that look up what followed the same words before."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from stepladder.workers.core import Sequence
from stepladder.workers.params import check
from stepladder.workers.speculation.drafter import Draft, Drafter, OpenDraft, Verified
from stepladder.workers.speculation.drafters.calibration import Calibration
from stepladder.workers.speculation.drafters.occurrences import Occurrences

__all__ = ["Guess", "Lookup", "State"]


class Guess(NamedTuple):
    """A token that may come next, and the kind of guess that this is, by which its confidence is known."""

    token: int
    kind: int


@dataclass
class State:
    """What is kept of a sequence.

    own: its prompt and output. known: how many tokens of it have been seen. seed: of the noise that its tokens are
    drawn with, if a draft may foresee that. guesses: for the tokens behind those.
    """

    own: Occurrences
    known: int = 0
    seed: int | None = None
    guesses: list[Guess] = field(default_factory=list)


class Lookup(Drafter):
    """Each sequence has an index of its own tokens, made when a draft is first asked for: some 2 to 4 µs for each
    token, once.

    A draft ends where the product of its confidences would fall below `threshold`. The guess that ended it is
    remembered too, and if the sequence comes there, its kind learns whether it was right: so kinds that are not drafted
    can become so, and nothing has to be drafted only to learn.
    """

    def __init__(self, threshold: float, estimates: list[float]) -> None:
        check(0 <= threshold <= 1, f"a drafter's threshold is {threshold}; it is a probability, from 0 to 1")
        self.threshold = threshold
        self.calibration = Calibration(estimates)
        self.states: dict[str, State] = {}

    @abstractmethod
    def index(self) -> Occurrences:
        """An empty one for a sequence."""

    @abstractmethod
    def guess(self, state: State, context: list[int], most: int, ahead: int = 0) -> list[Guess]:
        """How it may go on behind its last tokens `context`, of which `ahead` are drafted."""

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        return [self._draft(*pair) for pair in zip(sequences, most, strict=True)]

    def observe(self, verified: list[Verified]) -> None:
        for each in verified:
            if each.sequence.request.id in self.states:  # not one that has been forgotten, or never asked for
                self.follow(each.sequence)

    def forget(self, sequence: Sequence) -> None:
        if sequence.request.id in self.states:
            self.follow(sequence)
            del self.states[sequence.request.id]

    def follow(self, sequence: Sequence) -> State:
        """Take in the tokens that are new."""
        state = self.states.get(sequence.request.id)
        if state is None:
            state = self.states[sequence.request.id] = State(self.index())
        params = sequence.request.params
        state.seed = params.seed if sequence.coupled and params.temperature > 0 else None
        stop = len(sequence.tokens) - sequence.is_drawing
        if stop > state.known:
            self._learn(state.guesses, sequence.tokens[state.known : stop])
            state.own.extend(sequence.tokens, state.known, stop)
            state.known, state.guesses = stop, []
        return state

    def _learn(self, guesses: list[Guess], tokens: list[int]) -> None:
        for guess, token in zip(guesses, tokens, strict=False):
            self.calibration.learn(guess.kind, guess.token == token)
            if guess.token != token:
                break

    def _draft(self, sequence: Sequence, most: int) -> Draft:
        if most <= 0 or sequence.is_drawing:
            return Draft([], [], self.version)
        state = self.follow(sequence)
        guesses = self.guess(state, sequence.tokens[-state.own.depth :], most)
        draft = OpenDraft(most, self.threshold, self.version)
        for token, kind in guesses:
            if not draft.take(token, self.calibration.rates[kind]):
                break
        state.guesses = guesses[: len(draft.made.tokens) + 1]
        return draft.made
