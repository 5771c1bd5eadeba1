"""What the target writes leaves an engine for whoever learns from it: tokens, and the states they were drawn from."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.kernels.transfer import Download
from stepladder.workers.core import Request, Sequence
from stepladder.workers.speculation.drafter import Verified, agreeing
from stepladder.workers.speculation.learning.lessons import Captured, Lesson, number_of

__all__ = ["Capture"]


class _Part(NamedTuple):
    """What a step did for a sequence. start: of its tokens in the sequence. wrong: the place among them where a drafted
    token was rejected, or -1."""

    request: Request
    start: int
    tokens: list[int]
    wrong: int


@dataclass
class _Step:
    """Parts whose states are on their way to the host, those of each part behind those of the one before; ended: ids of
    requests that have nothing behind this."""

    states: Download
    parts: list[_Part]
    ended: list[str] = field(default_factory=list)


@dataclass
class _Piece:
    """What has come of a request since its last piece was given. stop: where that ends in the sequence."""

    domain: str
    number: int
    stop: int
    tokens: list[int] = field(default_factory=list)
    wrong: list[bool] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def add(self, part: _Part, states: Tensor) -> None:
        self.tokens += part.tokens
        self.wrong += [at == part.wrong for at in range(len(part.tokens))]
        self.states.append(states)
        self.stop = part.start + len(part.tokens)

    def take(self) -> Captured:
        lesson = Lesson(torch.tensor(self.tokens), torch.cat(self.states), torch.tensor(self.wrong))
        self.tokens, self.wrong, self.states = [], [], []
        return Captured(self.domain, self.number, lesson)


class Capture:
    """Keeps what requests are answered, unless they say `learn=False`, states in bf16: 2 bytes per number.

    A step's states are copied together, and on CUDA nobody waits for that: they are taken in by the first call that
    finds them on the host, in order. It belongs to the thread of its engine, for as long as that has it.

    Args:
        give: takes each piece, in that thread. piece: tokens that it has at most; the last one of a request has what is
            left.
    """

    def __init__(self, give: Callable[[Captured], object], piece: int = 64) -> None:
        assert piece > 0
        self._give, self._most = give, piece
        self._pieces: dict[str, _Piece] = {}  # by request id
        self._on_the_way: deque[_Step] = deque()

    def observe(self, verified: list[Verified]) -> None:
        """What the last step did, with hidden states; after each one."""
        kept = [each for each in verified if each.sequence.request.learn and each.hidden is not None]
        if kept:
            rows = torch.cat([each.hidden[: len(each.tokens)] for each in kept]).to(torch.bfloat16)
            self._on_the_way.append(_Step(Download((rows,), rows.device), [_part(each) for each in kept]))
        self._take_in()

    def forget(self, sequence: Sequence) -> None:
        """It has ended or was aborted; what is left of it is given."""
        if self._on_the_way:
            self._on_the_way[-1].ended.append(sequence.request.id)
            self._take_in()
        else:
            self._end(sequence.request.id)

    def settle(self) -> None:
        """Between steps, when there is no work: take in everything, waiting for what is on its way."""
        for step in self._on_the_way:
            step.states.wait()
        self._take_in()

    def _take_in(self) -> None:
        while self._on_the_way and self._on_the_way[0].states.landed:
            step = self._on_the_way.popleft()
            (states,) = step.states.wait()
            for part, rows in zip(step.parts, states.split([len(part.tokens) for part in step.parts]), strict=True):
                self._add(part, rows)
            for request_id in step.ended:
                self._end(request_id)

    def _add(self, part: _Part, states: Tensor) -> None:
        request = part.request
        piece = self._pieces.get(request.id)
        if piece is None:
            piece = self._pieces[request.id] = _Piece(request.domain, number_of(request), part.start)
        if piece.stop != part.start or len(piece.tokens) + len(part.tokens) > self._most:
            self._give_up(piece)
        piece.add(part, states)
        if len(piece.tokens) >= self._most:
            self._give_up(piece)

    def _end(self, request_id: str) -> None:
        if piece := self._pieces.pop(request_id, None):
            self._give_up(piece)

    def _give_up(self, piece: _Piece) -> None:
        if piece.tokens:
            self._give(piece.take())


def _part(each: Verified) -> _Part:
    """With a step under way, the sequence has a placeholder behind these tokens."""
    sequence, tokens = each.sequence, list(each.tokens)
    right = agreeing(each.drafted, tokens)
    wrong = right if right < min(len(each.drafted), len(tokens)) else -1
    return _Part(sequence.request, len(sequence.tokens) - sequence.is_drawing - len(tokens), tokens, wrong)
