"""What a head learns from: the texts that its target wrote, with the hidden states that every token was drawn from."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.core import Sequence
from stepladder.workers.speculation.drafter import Draft, Drafter, Verified

__all__ = ["Capture", "Lesson", "Lessons"]


class Lesson(NamedTuple):
    """One output: tokens int64 [N], and the target's final hidden states that they were drawn from [N, hidden]."""

    tokens: Tensor
    states: Tensor


class Lessons(NamedTuple):
    """Several, one behind the other: tokens int64 [N], states fp32 [N, hidden], starts int64 [M]: the places behind
    which `depth` more tokens of the same output follow."""

    tokens: Tensor
    states: Tensor
    starts: Tensor
    depth: int

    @classmethod
    def of(cls, lessons: Seq[Lesson], depth: int) -> "Lessons":
        """Raises ValueError if no output is long enough."""
        starts, at = [], 0
        for lesson in lessons:
            starts.append(torch.arange(at, at + max(0, len(lesson.tokens) - depth)))
            at += len(lesson.tokens)
        if not sum(map(len, starts)):
            raise ValueError(f"a head learns from outputs of more than {depth} tokens, and there are none")
        tokens, states = (torch.cat(column) for column in zip(*lessons, strict=True))
        return cls(tokens, states.float(), torch.cat(starts), depth)


class Capture(Drafter):
    """Drafts nothing and keeps what the target writes, states in bf16: 2 bytes per number.

    Attributes:
        lessons: of requests that have ended, by their ids.
    """

    hidden = True

    def __init__(self) -> None:
        self.lessons: dict[str, Lesson] = {}
        self._open: dict[str, list[Lesson]] = {}

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        return [Draft([], [], self.version) for _ in sequences]

    def observe(self, verified: list[Verified]) -> None:
        for each in verified:
            states = each.hidden[: len(each.tokens)].to("cpu", torch.bfloat16, copy=True)
            self._open.setdefault(each.sequence.request.id, []).append(Lesson(torch.tensor(each.tokens), states))

    def forget(self, sequence: Sequence) -> None:
        if parts := self._open.pop(sequence.request.id, []):
            tokens, states = (torch.cat(column) for column in zip(*parts, strict=True))
            self.lessons[sequence.request.id] = Lesson(tokens, states)
