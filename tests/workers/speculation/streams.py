"""Texts that drafters are shown, and how they do on them."""

from collections.abc import Callable
from typing import NamedTuple

from stepladder.workers.core import Request, SamplingParams, Sequence
from stepladder.workers.speculation.drafter import Drafter, Verified


class Score(NamedTuple):
    steps: int
    drafted: int
    accepted: int


def sequence(
    prompt: list[int],
    output: list[int] | None = None,
    name: str = "a",
    learn: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
) -> Sequence:
    params, written = SamplingParams(temperature=temperature, seed=seed), tuple(output or ())
    return Sequence(Request(id=name, prompt=tuple(prompt), params=params, output=written, learn=learn))


def serve(
    drafter: Drafter, running: Sequence, text: list[int], most: int = 4, likeliest: Callable[[int], int] | None = None
) -> Score:
    """Let it go on to `text`, as an engine would; `likeliest` is what the model holds likeliest behind a token."""
    steps = drafted = right = 0
    while len(running.tokens) < len(text):
        at = len(running.tokens)
        [draft] = drafter.propose([running], [min(most, len(text) - at)])
        accepted = 0
        while accepted < len(draft.tokens) and draft.tokens[accepted] == text[at + accepted]:
            accepted += 1
        behind = [running.tokens[-1], *draft.tokens]
        came = text[at : at + accepted + 1]
        running.tokens += came
        likely = [[likeliest(token)] for token in behind] if likeliest else ()
        drafter.observe([Verified(running, draft.tokens, came, likely)])
        steps, drafted, right = steps + 1, drafted + len(draft.tokens), right + accepted
    return Score(steps, drafted, right)
