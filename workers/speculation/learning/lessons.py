"""What a head learns from: texts that its target wrote, with the hidden states that every token was drawn from."""

from collections.abc import Sequence as Seq
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.core import Request

__all__ = ["Captured", "Lesson", "Lessons", "number_of", "starts_of"]


class Lesson(NamedTuple):
    """A piece of one output, without gaps.

    Attributes:
        tokens: int64 [N].
        states: [N, hidden], the target's final hidden states that they were drawn from; bf16 on the CPU, as captured.
        wrong: bool [N], where a drafted token was rejected. Where nothing was drafted, nothing was wrong.
    """

    tokens: Tensor
    states: Tensor
    wrong: Tensor

    @classmethod
    def joined(cls, parts: Seq["Lesson"]) -> "Lesson":
        """One behind the other."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Captured(NamedTuple):
    """A lesson from live traffic. domain: what it is learnt under, as `Request` has it. request: its `number_of`."""

    domain: str
    request: int
    lesson: Lesson


class Lessons(NamedTuple):
    """Several, one behind the other: tokens int64 [N], states fp32 [N, hidden], starts int64 [M]: the places behind
    which `depth` more tokens of the same piece follow."""

    tokens: Tensor
    states: Tensor
    starts: Tensor
    depth: int

    @classmethod
    def of(cls, lessons: Seq[Lesson], depth: int, errors_only: bool = False) -> "Lessons":
        """Raises ValueError if no piece is long enough; with `errors_only` there may be no starts."""
        if not any(len(lesson.tokens) > depth for lesson in lessons):
            raise ValueError(f"a head learns from outputs of more than {depth} tokens, and there are none")
        starts, at = [], 0
        for lesson in lessons:
            starts.append(at + starts_of(lesson, depth, errors_only))
            at += len(lesson.tokens)
        all_of = Lesson.joined(lessons)
        return cls(all_of.tokens, all_of.states.float(), torch.cat(starts), depth)


def starts_of(lesson: Lesson, depth: int, errors_only: bool = False) -> Tensor:
    """The places of a lesson that a draft of `depth` can be learnt from: int64 [M].

    Args:
        errors_only: only those behind which a drafted token was rejected within `depth` tokens, perhaps none. A draft
            from start s foresees the states s + 1 to s + depth, which the tokens there were drawn from: what was wrong
            at place w is mended from w - 1 and before, never from w.
    """
    starts = torch.arange(max(0, len(lesson.tokens) - depth))
    if errors_only and len(starts):
        starts = starts[lesson.wrong[starts[:, None] + torch.arange(1, depth + 1)].any(-1)]
    return starts


def number_of(request: Request) -> int:
    """A number of 63 bits for a request and its replays, whichever engine they are on: by its name, prompt and seed,
    since a client may use a name twice."""
    text = f"{request.name}\n{request.params.seed}\n{hash(request.prompt)}"  # which is the same in every process
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
