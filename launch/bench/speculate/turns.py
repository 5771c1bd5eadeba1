"""One engine, several sides: the same prompts in the same order, by whoever drafts, in turns."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import NamedTuple

from stepladder.launch.bench.speculate.watched import Watched
from stepladder.workers.core import Request
from stepladder.workers.engine import Engine


class Served(NamedTuple):
    """A turn's requests, from the first's arrival to the last token. texts: tokens by request. per_token: seconds of
    each token behind a request's first one, on average, of each request that has several."""

    seconds: float
    texts: list[list[int]]
    per_token: list[float]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass
class Side:
    """What is measured. speculator: None for plain decoding. served: its turns, in order."""

    name: str
    speculator: Watched | None = None
    served: list[Served] = field(default_factory=list)

    def serve(self, engine: Engine, requests: Seq[Request], at_once: int | None = None) -> Served:
        """Serve these alone, with none of their prompts known, so many `at_once`; None for all."""
        engine.speculate(self.speculator)
        try:
            return serve(engine, requests, at_once or len(requests))
        finally:
            engine.speculate(None)


def serve(engine: Engine, requests: Seq[Request], at_once: int) -> Served:
    """Where there are more, the next one comes when one has ended."""
    engine.scheduler.blocks.forget()
    waiting = iter(requests)
    texts: dict[str, list[int]] = {request.id: [] for request in requests}
    first, last = dict[str, float](), dict[str, float]()
    began = perf_counter()
    for request in islice(waiting, at_once):
        engine.add(request)
    while engine.has_work:
        outputs, now = engine.step(), perf_counter()
        for output in outputs:
            texts[output.id] += output.tokens
            first.setdefault(output.id, now)
            last[output.id] = now
        ended = sum(output.finish_reason is not None for output in outputs)
        for request in islice(waiting, ended):
            engine.add(request)
    seconds = perf_counter() - began
    several = [request.id for request in requests if len(texts[request.id]) > 1]
    return Served(seconds, list(texts.values()), [(last[i] - first[i]) / (len(texts[i]) - 1) for i in several])


def take_turns(engine: Engine, sides: Seq[Side], turns: Seq[Seq[Request]], at_once: int | None = None) -> None:
    """Every side serves the requests of every turn, each time another one first."""
    for turn, requests in enumerate(turns):
        for place in range(len(sides)):
            side = sides[(turn + place) % len(sides)]
            side.served.append(side.serve(engine, requests, at_once))
