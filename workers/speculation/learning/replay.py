"""What has been captured of late, kept to be learnt from more than once, and a part of it kept to judge by."""

from collections import OrderedDict, deque
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.speculation.learning.lessons import Captured, Lesson, Lessons, starts_of

__all__ = ["HeldOut", "Replay"]

NEWEST = 2048  # tokens that half of every batch is drawn from
HALF_LIFE = 1 << 16  # tokens after which an occurrence counts half, for the draft vocabulary


class HeldOut(NamedTuple):
    """A request that is never learnt from: its pieces, in the order in which they came."""

    domain: str
    request: int
    lessons: list[Lesson]

    @property
    def tokens(self) -> int:
        return sum(len(lesson.tokens) for lesson in self.lessons)


class Replay:
    """Bounded by tokens; when it is full, the oldest of the largest domain go, so that a domain which nobody asks for
    any more is not forgotten. Whoever learns from new requests alone forgets the old kind, and one pass over them
    teaches little.

    Args:
        max_tokens: that are kept to learn from; of those that are held out, at most that many over `held_out`.
        held_out: of so many requests one is, by its id.
        depth: tokens that follow every place of a batch. errors_only: places are those where drafting went wrong.
        newest: tokens that half of every batch is drawn from.

    Attributes:
        seen: tokens to learn from that have ever been added.
        counts: how often each token of the vocabulary occurred, older ones counting less: float64 [ids seen so far].
    """

    def __init__(
        self, max_tokens: int, held_out: int, depth: int, seed: int, errors_only: bool = False, newest: int = NEWEST
    ) -> None:
        assert max_tokens > 0 and held_out > 1 and depth > 0 and newest > 0
        self.max_tokens, self.held_out, self.depth, self.errors_only = max_tokens, held_out, depth, errors_only
        self.seen, self.counts = 0, torch.zeros(0, dtype=torch.float64)
        self._dice = torch.Generator().manual_seed(seed)
        self._shelves: dict[str, _Shelf] = {}
        self._newest, self._room = _Shelf(), min(newest, max_tokens // 2)
        self._window: OrderedDict[int, HeldOut] = OrderedDict()

    def add(self, captured: list[Captured]) -> None:
        """In the order in which it was written. States that are not finite teach nothing and are left out."""
        for each in captured:
            lesson = each.lesson
            if not len(lesson.tokens) or not bool(lesson.states.isfinite().all()):
                continue
            self._count(lesson.tokens)
            if each.request % self.held_out == 0:
                held = self._window.setdefault(each.request, HeldOut(each.domain, each.request, []))
                held.lessons.append(lesson)
                self._window.move_to_end(each.request)
            else:
                self.seen += len(lesson.tokens)
                piece = _Piece(lesson, starts_of(lesson, self.depth, self.errors_only), each.request)
                self._shelves.setdefault(each.domain, _Shelf()).add(piece)
                self._newest.add(piece)
        self._make_room()

    def batch(self, places: int) -> tuple[Lessons, Tensor]:
        """Half of the places from the newest tokens, half from all domains alike, with replacement: lessons of
        depth + 1 tokens each, and where they start.

        Raises:
            ValueError: there is nothing to learn from.
        """
        if not self.places:
            raise ValueError(f"there is no output of more than {self.depth} tokens to learn from")
        domains = [shelf for shelf in self._shelves.values() if shelf.places]
        newest = places // 2 if self._newest.places else 0
        drawn = self._newest.draw(newest, self._dice)
        if rest := places - newest:
            chosen = torch.randint(len(domains), (rest,), generator=self._dice)
            for shelf, count in zip(domains, torch.bincount(chosen, minlength=len(domains)).tolist(), strict=True):
                drawn += shelf.draw(count, self._dice)
        return self._lessons(drawn)

    def first(self, places: int) -> Lessons:
        """Up to so many places, each once, newest first, domains in turns: to fit on."""
        domains = [iter(reversed(shelf.pieces)) for shelf in self._shelves.values()]
        drawn: list[tuple[Lesson, int]] = []
        while domains and len(drawn) < places:
            for pieces in list(domains):
                if (piece := next(pieces, None)) is None:
                    domains.remove(pieces)
                else:
                    drawn += [(piece.lesson, start) for start in piece.starts.tolist()]
        return self._lessons(drawn[:places])[0]

    def window(self, requests: int, depth: int | None = None) -> list[HeldOut]:
        """The newest so many that are held out, oldest first; those that a draft of `depth` (else of the lessons')
        can be judged on."""
        least = (self.depth if depth is None else depth) + 1
        long = [held for held in self._window.values() if any(len(piece.tokens) >= least for piece in held.lessons)]
        return long[-requests:] if requests else []

    @property
    def domains(self) -> dict[str, int]:
        """Tokens to learn from, by domain."""
        return {domain: shelf.tokens for domain, shelf in self._shelves.items()}

    @property
    def requests(self) -> int:
        """Of which something can be learnt."""
        return len({piece.request for shelf in self._shelves.values() for piece in shelf.pieces})

    @property
    def places(self) -> int:
        """That can be learnt from."""
        return sum(shelf.places for shelf in self._shelves.values())

    def frequent(self, size: int, vocab_size: int, known: Tensor | None = None) -> Tensor:
        """The `size` most frequent tokens, int64, ascending; of those not seen the `known` ones first, then low ids,
        which tokenizers have learnt first."""
        counts = torch.zeros(vocab_size, dtype=torch.float64)
        counts[: len(self.counts)] = self.counts
        if known is not None:
            counts[known] += self.counts[self.counts > 0].min() / 2 if bool((self.counts > 0).any()) else 1
        return counts.sort(descending=True, stable=True).indices[:size].sort().values

    def _count(self, tokens: Tensor) -> None:
        counted = torch.bincount(tokens, minlength=len(self.counts)).double()
        faded = self.counts * 0.5 ** (len(tokens) / HALF_LIFE)
        counted[: len(faded)] += faded
        self.counts = counted

    def _make_room(self) -> None:
        held = sum(shelf.tokens for shelf in self._shelves.values())
        while held > self.max_tokens:
            domain, largest = max(self._shelves.items(), key=lambda item: item[1].tokens)
            held -= len(largest.drop().lesson.tokens)
            if not largest.pieces:
                del self._shelves[domain]  # clients name domains: they may be many
        while self._newest.tokens > self._room and len(self._newest.pieces) > 1:
            self._newest.drop()
        waiting = sum(held.tokens for held in self._window.values())
        while waiting > self.max_tokens // self.held_out and len(self._window) > 1:
            waiting -= self._window.popitem(last=False)[1].tokens

    def _lessons(self, drawn: list[tuple[Lesson, int]]) -> tuple[Lessons, Tensor]:
        size = self.depth + 1
        tokens = torch.cat([lesson.tokens[start : start + size] for lesson, start in drawn])
        states = torch.cat([lesson.states[start : start + size] for lesson, start in drawn])
        starts = torch.arange(len(drawn)) * size
        return Lessons(tokens, states.float(), starts, self.depth), starts


class _Piece(NamedTuple):
    lesson: Lesson
    starts: Tensor
    request: int


class _Shelf:
    """Pieces in the order in which they came, any of whose places can be drawn."""

    def __init__(self) -> None:
        self.pieces: deque[_Piece] = deque()
        self.tokens = self.places = 0
        self._index: tuple[list[_Piece], Tensor] | None = None  # the pieces, and how many places end with each

    def add(self, piece: _Piece) -> None:
        self.pieces.append(piece)
        self._changed(piece, 1)

    def drop(self) -> _Piece:
        """The oldest goes."""
        piece = self.pieces.popleft()
        self._changed(piece, -1)
        return piece

    def draw(self, count: int, dice: torch.Generator) -> list[tuple[Lesson, int]]:
        """So many places, all as likely, with replacement."""
        if not count:
            return []
        if self._index is None:
            self._index = list(self.pieces), torch.tensor([len(piece.starts) for piece in self.pieces]).cumsum(0)
        pieces, ends = self._index
        places = torch.randint(self.places, (count,), generator=dice)
        which = torch.searchsorted(ends, places, right=True)
        backwards = (ends[which] - places).tolist()  # 1 is the last one of its piece
        found = ((pieces[i], back) for i, back in zip(which.tolist(), backwards, strict=True))
        return [(piece.lesson, int(piece.starts[-back])) for piece, back in found]

    def _changed(self, piece: _Piece, sign: int) -> None:
        self.tokens += sign * len(piece.lesson.tokens)
        self.places += sign * len(piece.starts)
        self._index = None
