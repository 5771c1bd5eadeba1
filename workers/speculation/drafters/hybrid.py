"""Looks up where a text is like others, and asks a head where it is not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.kernels.cpu.native import computing
from stepladder.kernels.transfer import upload
from stepladder.workers.core import Sequence
from stepladder.workers.speculation.drafter import Draft, Drafter, Verified
from stepladder.workers.speculation.drafters.head import Foreseen, HeadDrafter
from stepladder.workers.speculation.drafters.lookup import Guess, Lookup, State

__all__ = ["Hybrid"]

SURE = 0.75  # a looked-up token that is known so well needs no second opinion


@dataclass
class _Open:
    """A draft under way.

    Attributes:
        most: tokens that it may have. known: what the lookup keeps of the sequence. chain: what it found for the tokens
            from place `at` of the draft on. state: the head's, which has read `read` tokens: the sequence's last one,
            then those of the draft; None if it knows nothing of this sequence. chance: of all that is drafted.
    """

    sequence: Sequence
    draft: Draft
    most: int
    known: State
    chain: list[Guess]
    state: Tensor | None
    at: int = 0
    read: int = 0
    chance: float = 1.0
    is_over: bool = False

    @property
    def known_state(self) -> Tensor:
        assert self.state is not None
        return self.state

    @property
    def next_unread(self) -> int:
        return self.draft.tokens[self.read - 1] if self.read else self.sequence.tokens[-1]


class Hybrid(Drafter):
    """At each place the more confident of two: what a lookup finds behind the draft so far, and what a head foresees
    there. The head reads a draft no further than it is asked.

    Args:
        lookup, head: the two; both are told everything. A draft ends at the head's threshold.
    """

    hidden = True

    def __init__(self, lookup: Lookup, head: HeadDrafter) -> None:
        self.lookup, self.head, self.version = lookup, head, head.version

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        drafts = [Draft([], [], self.version) for _ in sequences]
        with computing(self.head.cell.native):
            able = [i for i, limit in enumerate(most) if limit > 0 and not sequences[i].is_drawing]
            going = [self._begin(sequences[i], drafts[i], most[i]) for i in able]
            while going:
                guesses = [self._guess(each) for each in going]
                asked = [
                    e for e, guess in zip(going, guesses, strict=True) if guess.sure < SURE and e.state is not None
                ]
                foreseen = {id(each): found for each, found in zip(asked, self._foresee(asked), strict=True)}
                for each, guess in zip(going, guesses, strict=True):
                    self._take(each, max(guess, foreseen.get(id(each), guess), key=lambda found: found.sure))
                going = [each for each in going if not each.is_over]
        return drafts

    def observe(self, verified: list[Verified]) -> None:
        self.lookup.observe(verified)
        self.head.observe(verified)

    def forget(self, sequence: Sequence) -> None:
        self.lookup.forget(sequence)
        self.head.forget(sequence)

    def _begin(self, sequence: Sequence, draft: Draft, most: int) -> _Open:
        known = self.lookup.follow(sequence)
        known.guesses = self.lookup.guess(known, sequence.tokens[-known.own.depth :], most)
        state = self.head.begin([sequence])[0] if self.head.knows(sequence) else None
        return _Open(sequence, draft, most, known, known.guesses, state)

    def _guess(self, each: _Open) -> Foreseen:
        """What is looked up for the next token, as long as the draft has followed what was found, without looking
        again."""
        place, depth = len(each.draft.tokens), each.known.own.depth
        if place > each.at and place - each.at >= len(each.chain):
            context = [*each.sequence.tokens[-depth:], *each.draft.tokens][-depth:]
            each.chain, each.at = self.lookup.guess(each.known, context, each.most - place), place
        if not each.chain:
            return Foreseen(-1, 0.0)
        token, kind = each.chain[place - each.at]
        return Foreseen(token, self.lookup.calibration.rates[kind])

    def _foresee(self, asked: list[_Open]) -> list[Foreseen]:
        """What the head holds likely behind these drafts, which it reads first."""
        if not asked:
            return []
        behind = asked
        while behind := [each for each in behind if each.read <= len(each.draft.tokens)]:
            states = torch.stack([each.known_state for each in behind])
            states = self.head.cell.step(states, upload([each.next_unread for each in behind], states.device))
            for each, state in zip(behind, states, strict=True):
                each.state, each.read = state, each.read + 1
        states = torch.stack([each.known_state for each in asked])
        return self.head.foresee(states, [(each.sequence, each.draft.tokens) for each in asked])

    def _take(self, each: _Open, found: Foreseen) -> None:
        """Go on with it, or end the draft."""
        each.chance *= found.sure
        each.is_over = each.chance < self.head.threshold or not found.sure
        if each.is_over:
            return
        place = len(each.draft.tokens)
        if place - each.at < len(each.chain) and each.chain[place - each.at].token != found.token:
            each.chain, each.at = [], place  # it leaves what was found
        each.draft.tokens.append(found.token)
        each.draft.confidence.append(found.sure)
        each.is_over = len(each.draft.tokens) == each.most
