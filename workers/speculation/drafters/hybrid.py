"""Looks up where a text is like others, and asks a head where it is not."""

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from stepladder.kernels.cpu.native import computing
from stepladder.kernels.transfer import upload
from stepladder.workers.core import Sequence
from stepladder.workers.speculation.drafter import Draft, Drafter, OpenDraft, Verified
from stepladder.workers.speculation.drafters.head import Cell, Foreseen, HeadDrafter
from stepladder.workers.speculation.drafters.lookup import Guess, Lookup, State

__all__ = ["Hybrid"]


@dataclass
class _Open:
    """A draft under way.

    Attributes:
        known: what the lookup keeps of the sequence. chain: what it found for the tokens from place `at` of the draft
            on. state: the head's, which has read `read` tokens: the sequence's last one, then those of the draft; None
            if it knows nothing of this sequence.
    """

    sequence: Sequence
    draft: OpenDraft
    known: State
    chain: list[Guess]
    state: Tensor | None
    at: int = 0
    read: int = 0

    @property
    def tokens(self) -> list[int]:
        """Those drafted so far."""
        return self.draft.made.tokens

    @property
    def known_state(self) -> Tensor:
        assert self.state is not None
        return self.state

    @property
    def next_unread(self) -> int:
        return self.tokens[self.read - 1] if self.read else self.sequence.tokens[-1]


class Hybrid(Drafter):
    """At each place the more confident of two: what a lookup finds behind the draft so far, and what a head foresees
    there. The head reads a draft no further than it is asked.

    Args:
        lookup, head: the two; both are told everything. Each drafts as far as its own threshold, the head as far as
            that pays.
    """

    hidden = True

    def __init__(self, lookup: Lookup, head: HeadDrafter) -> None:
        self.lookup, self.head, self.version = lookup, head, head.version

    def swap(self, weights: Cell | None) -> None:
        self.head.swap(weights)
        self._tell()

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        drafts = [OpenDraft(limit, self.lookup.threshold, self.version) for limit in most]
        pairs = zip(sequences, drafts, strict=True)
        self.head.terms = self.terms
        with computing(self.head.native):
            going = [self._begin(s, draft) for s, draft in pairs if draft.most > 0 and not s.is_drawing]
            while going:
                found = [self._guess(each) for each in going]
                asked = [i for i, each in enumerate(going) if self._asks(each, found[i].sure)]
                for i, foreseen in zip(asked, self._foresee([going[i] for i in asked]), strict=True):
                    found[i] = max(found[i], foreseen, key=lambda one: one.sure)
                going = [each for each, one in zip(going, found, strict=True) if self._take(each, one)]
        return [draft.made for draft in drafts]

    def observe(self, verified: list[Verified]) -> None:
        self.lookup.observe(verified)
        self.head.observe(verified)
        self._tell()

    def forget(self, sequence: Sequence) -> None:
        self.lookup.forget(sequence)
        self.head.forget(sequence)

    def _asks(self, each: _Open, known: float) -> bool:
        """Whether the head's opinion is to be had, and worth its time beside a token that is known so well."""
        return each.state is not None and self.head.pays(each.draft.chance, known)

    def _tell(self) -> None:
        """What is counted is the head's."""
        head = self.head
        self.version, self.guesses, self.right = head.version, head.guesses, head.right

    def _begin(self, sequence: Sequence, draft: OpenDraft) -> _Open:
        known = self.lookup.follow(sequence)
        known.guesses = self.lookup.guess(known, sequence.tokens[-known.own.depth :], draft.most)
        state = self.head.begin([sequence])[0] if self.head.knows(sequence) else None
        return _Open(sequence, draft, known, known.guesses, state)

    def _guess(self, each: _Open) -> Foreseen:
        """What is looked up for the next token, as long as the draft has followed what was found, without looking
        again."""
        place, depth = len(each.tokens), each.known.own.depth
        if place > each.at and place - each.at >= len(each.chain):
            context = [*each.sequence.tokens[-depth:], *each.tokens][-depth:]
            each.chain, each.at = self.lookup.guess(each.known, context, each.draft.most - place, place), place
        if not each.chain:
            return Foreseen(-1, 0.0)
        token, kind = each.chain[place - each.at]
        return Foreseen(token, self.lookup.calibration.rates[kind])

    def _foresee(self, asked: list[_Open]) -> list[Foreseen]:
        """What the head holds likely behind these drafts, which it reads first."""
        if not asked:
            return []
        began, behind = perf_counter(), asked
        while behind := [each for each in behind if each.read <= len(each.tokens)]:
            states = torch.stack([each.known_state for each in behind])
            states = self.head.cell.step(states, upload([each.next_unread for each in behind], states.device))
            for each, state in zip(behind, states, strict=True):
                each.state, each.read = state, each.read + 1
        states = torch.stack([each.known_state for each in asked])
        found = self.head.foresee(states, [(each.sequence, each.tokens) for each in asked])
        self.head.price.paid(perf_counter() - began, (one.sure for one in found))
        return found

    @staticmethod
    def _take(each: _Open, found: Foreseen) -> bool:
        """Whether the draft goes on behind it."""
        place = len(each.tokens)
        if place - each.at < len(each.chain) and each.chain[place - each.at].token != found.token:
            each.chain, each.at = [], place  # it leaves what was found
        return found.sure > 0 and each.draft.take(found.token, found.sure)
