"""What travels between an engine's door for lessons and whoever reads there: msgpack, and states as they lie in memory.

Decoding checks every type; nothing is unpickled.
"""

from collections.abc import Sequence as Seq
from typing import Annotated, Any

import msgspec
import torch

from stepladder.workers.speculation.learning.lessons import Captured, Lesson

__all__ = ["Answer", "Ask", "decode_ask", "encode", "pack", "unpack"]

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Ask(msgspec.Struct, tag="ask", array_like=True, frozen=True):
    """Give me up to so many tokens. number: counts up, and the answer has it."""

    number: int
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """A `Captured` without its states, which are a frame of their own: bf16 [tokens, hidden], as they lie in memory."""

    domain: Annotated[str, msgspec.Meta(max_length=512)]
    request: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    tokens: Annotated[list[Token], msgspec.Meta(min_length=1)]
    wrong: list[bool]
    hidden: Annotated[int, msgspec.Meta(ge=1)]


class Answer(msgspec.Struct, tag="bf16 lessons", array_like=True, frozen=True):
    """pieces: what there is, at most. more: and then something is left."""

    number: int
    more: bool
    pieces: list[Piece]


encode = msgspec.msgpack.Encoder().encode
decode_ask = msgspec.msgpack.Decoder(Ask).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


def pack(number: int, more: bool, captured: Seq[Captured]) -> list[Any]:
    """Frames of an answer; those of states are the tensors' own memory, not copies."""
    pieces, states = [], []
    for domain, request, lesson in captured:
        pieces.append(Piece(domain, request, lesson.tokens.tolist(), lesson.wrong.tolist(), lesson.states.shape[1]))
        assert lesson.states.dtype == torch.bfloat16
        array: Any = lesson.states.contiguous().view(torch.uint8).numpy()
        states.append(memoryview(array).cast("B"))
    return [encode(Answer(number, more, pieces)), *states]


def unpack(frames: Seq[Any]) -> tuple[Answer, list[Captured]]:
    """Raises ValueError: it is no answer, or a number in it cannot be."""
    try:
        answer = _decode_answer(frames[0])
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if len(frames) != 1 + len(answer.pieces):
        raise ValueError(f"{len(answer.pieces)} pieces came with {len(frames) - 1} frames of states")
    return answer, [_captured(piece, frame) for piece, frame in zip(answer.pieces, frames[1:], strict=True)]


def _captured(piece: Piece, frame: Any) -> Captured:
    tokens, found = len(piece.tokens), len(frame)
    if len(piece.wrong) != tokens or found != tokens * piece.hidden * torch.bfloat16.itemsize:
        raise ValueError(
            f"a piece of {tokens} tokens and {piece.hidden} numbers for each came with {len(piece.wrong)} flags and "
            f"{found} bytes of states"
        )
    states = torch.frombuffer(bytearray(frame), dtype=torch.bfloat16).view(tokens, piece.hidden)
    if not states.isfinite().all():
        raise ValueError("states are not finite")
    return Captured(piece.domain, piece.request, Lesson(torch.tensor(piece.tokens), states, torch.tensor(piece.wrong)))
