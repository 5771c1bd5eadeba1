"""Requests that come in bursts, with lulls between them in which nobody wants the machine."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from stepladder.launch.bench.learning.options import LearningBench
from stepladder.launch.recipes.library_traffic import texts
from stepladder.launch.streaming import Timing, session, stream

CHARACTERS = 160  # of a prompt


@dataclass
class Load:
    """What was served. busy_seconds: in which requests were under way. begin, end: on the machine's monotonic clock."""

    begin: float
    end: float = 0.0
    busy_seconds: float = 0.0
    timings: list[Timing] = field(default_factory=list)


class Traffic:
    """Bursts of `streams` requests at once; the next one begins a while after the last answer of the one before. No
    beginning occurs twice until all have; the same for the same seed and version of Python."""

    def __init__(self, url: str, model: str, config: LearningBench) -> None:
        self._url, self._model, self._config = f"{url}/v1/completions", model, config
        self._dice, self._sent = random.Random(config.seed), 0
        self._prompts = _prompts(config.kind, config.seed)

    def serve(self, seconds: float) -> Load:
        """Bursts that begin within this time, to their ends; before each there is a lull."""
        return asyncio.run(self._serve(seconds))

    async def _serve(self, seconds: float) -> Load:
        load = Load(monotonic())
        async with session() as opened:
            while True:
                lull = self._dice.uniform(*self._config.lulls)
                if monotonic() + lull >= load.begin + seconds:
                    break
                await asyncio.sleep(lull)
                began = monotonic()
                bodies = [self._body() for _ in range(self._config.streams)]
                load.timings += await asyncio.gather(*(stream(opened, self._url, body) for body in bodies))
                load.busy_seconds += monotonic() - began
        load.end = monotonic()
        return load

    def _body(self) -> dict[str, Any]:
        self._sent += 1
        config = self._config
        body = {"model": self._model, "prompt": next(self._prompts), "max_tokens": config.tokens, "ignore_eos": True}
        return body | {"temperature": config.temperature, "seed": config.seed + self._sent}


def _prompts(kind: str, seed: int) -> Iterator[str]:
    """Pieces of the documents of this kind, over and over."""
    pieces = sorted({text[at : at + CHARACTERS] for text in texts(kind) for at in range(0, len(text), CHARACTERS)})
    random.Random(seed).shuffle(pieces)
    while True:
        yield from pieces
