"""What travels from an engine's door to a reader: read whole, or refused."""

from typing import Any

import pytest
import torch

from stepladder.workers.speculation.learning.lessons import Captured
from stepladder.workers.speculation.learning.wire import Answer, Ask, Piece, decode_ask, encode, pack, unpack
from tests.workers.speculation.learning.captures import lesson


def sent(header: Any, *states: bytes) -> list[bytes]:
    return [encode(header), *states]


def header(**fields: Any) -> Answer:
    whole = {"domain": "a", "request": 1, "tokens": [1, 2], "wrong": [True, False], "hidden": 3, **fields}
    return Answer(1, False, [Piece(**whole)])


STATES = torch.ones(2, 3, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
NAN = torch.full((2, 3), float("nan"), dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
BROKEN: dict[str, list[bytes]] = {
    "nothing": [b""],
    "noise": [b"\xc1\xff\x00"],
    "nested": [b"\x91" * 100_000],
    "no states": sent(header()),
    "too many frames": sent(header(), STATES, STATES),
    "too short": sent(header(), STATES[:-1]),
    "too long": sent(header(), STATES + b"ab"),
    "another width": sent(header(hidden=2), STATES),
    "no width": sent(header(hidden=0), b""),
    "no tokens": sent(header(tokens=[], wrong=[]), b""),
    "negative tokens": sent(header(tokens=[1, -1]), STATES),
    "large tokens": sent(header(tokens=[1, 1 << 31]), STATES),
    "fractions": sent(header(tokens=[1, 1.5]), STATES),
    "too few flags": sent(header(wrong=[True]), STATES),
    "flags that are numbers": sent(header(wrong=[1, 0]), STATES),
    "negative number": sent(header(request=-1), STATES),
    "endless domain": sent(header(domain="d" * 513), STATES),
    "not finite": sent(header(), NAN),
    "another kind": sent(["fp32 lessons", 1, False, []]),
}


@pytest.mark.parametrize("frames", BROKEN.values(), ids=BROKEN)
def test_garbage_from_an_engine_is_no_lesson(frames: list[bytes]) -> None:
    with pytest.raises(ValueError):
        unpack(frames)


def test_what_is_whole_is_read() -> None:
    """So that the table above fails for the reasons that it names."""
    answer, [found] = unpack(sent(header(), STATES))
    assert answer.number == 1 and found[:2] == ("a", 1)
    assert found.lesson.tokens.tolist() == [1, 2] and found.lesson.wrong.tolist() == [True, False]
    assert found.lesson.states.tolist() == [[1.0] * 3] * 2


def test_a_large_piece_is_not_copied_on_its_way_out() -> None:
    captured = Captured("a", 1, lesson(64, 1024))
    _, states = pack(1, False, [captured])
    captured.lesson.states[0, 0] = 5.0
    assert torch.frombuffer(states, dtype=torch.bfloat16)[0] == 5.0


@pytest.mark.parametrize("tokens", [0, -1, 1 << 62, 1.5, "5", None])
def test_a_question_that_is_none(tokens: object) -> None:
    assert decode_ask(encode(Ask(3, 5))) == Ask(3, 5)
    with pytest.raises(ValueError):
        decode_ask(encode(["ask", 1, tokens]))
