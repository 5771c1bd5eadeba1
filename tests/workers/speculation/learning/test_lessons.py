"""Where a head can learn from lessons, and which request one is of."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.speculation.learning.lessons import Lessons, number_of
from tests.workers.speculation.learning.captures import lesson

REQUEST = Request(id="chat-0#1.7", prompt=(1, 2, 3), params=SamplingParams(seed=5))


def test_starts_never_reach_into_the_next_piece() -> None:
    made = Lessons.of([lesson(5), lesson(2), lesson(1), lesson(4)], 2)
    assert made.starts.tolist() == [0, 1, 2, 8, 9] and made.depth == 2
    assert made.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 0, 1, 2, 3]
    assert made.states.dtype == torch.float32 and torch.equal(made.states[5:7], lesson(2).states.float())
    with pytest.raises(ValueError, match="outputs of more than 5 tokens, and there are none"):
        Lessons.of([lesson(5), lesson(2)], 5)


@pytest.mark.parametrize(
    ("depth", "wrong", "starts"),
    [
        (1, [3], [2]),  # what stands at 3 is foreseen from 2; from 3 itself the token behind it is
        (1, [0], []),  # from nothing here
        (1, [7], [6]),
        (2, [3], [1, 2]),
        (2, [3, 4], [1, 2, 3]),
        (3, [7], [4]),  # the later starts have too little behind them
        (2, [], []),
    ],
)
def test_only_where_something_was_wrong(depth: int, wrong: list[int], starts: list[int]) -> None:
    other = lesson(6)
    made = Lessons.of([other, lesson(8, wrong=wrong)], depth, errors_only=True)
    assert made.starts.tolist() == [6 + start for start in starts]


def test_numbers_are_the_same_for_replays_alone() -> None:
    number = number_of(REQUEST)
    assert 0 <= number < 1 << 63
    assert number_of(replace(REQUEST, id="chat-0#2.1", output=(4, 5))) == number
    others = [
        replace(REQUEST, id="chat-1#1.7"),
        replace(REQUEST, prompt=(1, 2, 4)),
        replace(REQUEST, params=SamplingParams(seed=6)),
    ]
    assert len({number, *map(number_of, others)}) == 4
    code = f"""
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.speculation.learning.lessons import number_of
print(number_of({REQUEST!r}))
"""
    assert (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == number
    )
