"""What captures give, and what it should have been."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from stepladder.workers.core import Request
from stepladder.workers.speculation.drafter import Verified
from stepladder.workers.speculation.learning.lessons import Captured, Lesson, number_of
from tests.llama import read_llama
from tests.workers.speculation.serving import Texts
from tests.workers.speculation.test_coupled import Fickle

HIDDEN = 32  # of tests/llama.py


def lesson(tokens: int, hidden: int = 4, wrong: Iterable[int] = ()) -> Lesson:
    """Anything; rejected at some places."""
    flags, dice = torch.zeros(tokens, dtype=torch.bool), torch.Generator().manual_seed(tokens)
    flags[list(wrong)] = True
    states = torch.randn(tokens, hidden, generator=dice).bfloat16()
    return Lesson(torch.arange(tokens), states, flags)


def by_request(captured: list[Captured]) -> dict[int, Lesson]:
    """The pieces of each, put together."""
    parts: defaultdict[int, list[Lesson]] = defaultdict(list)
    for one in captured:
        parts[one.request].append(one.lesson)
    return {number: Lesson.joined(several) for number, several in parts.items()}


def states_of(model: Path, request: Request, output: list[int]) -> Tensor:
    """What `transformers` says that tokens of an output were drawn from."""
    oracle = read_llama(model)
    with torch.inference_mode():
        hidden = oracle.model(torch.tensor([[*request.prompt, *output]])).last_hidden_state[0]
    return hidden[len(request.prompt) - 1 : -1]


class Noting(Fickle):
    """Notes where a drafted token was rejected, by the id of the request: places in its output."""

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts)
        self.rejected: defaultdict[str, list[int]] = defaultdict(list)

    def observe(self, verified: list[Verified]) -> None:
        for each in verified:
            first = len(each.sequence.output) - len(each.tokens)
            for at, (drafted, token) in enumerate(zip(each.drafted, each.tokens, strict=False)):
                if drafted != token:
                    self.rejected[each.sequence.request.id].append(first + at)
                    break


def check(captured: list[Captured], made: list[Request], texts: Texts) -> None:
    """Every token of every output is there once, in order."""
    found = by_request(captured)
    assert {number: one.tokens.tolist() for number, one in found.items()} == {
        number_of(request): texts[request.id][0] for request in made
    }
    for one in found.values():
        assert one.states.dtype == torch.bfloat16 and one.states.shape == (len(one.tokens), HIDDEN)
        assert one.wrong.shape == one.tokens.shape and one.wrong.dtype == torch.bool
