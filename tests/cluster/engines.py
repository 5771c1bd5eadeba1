"""Real engines behind real channels, in threads, and routers that talk to them."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.gateway.router import Router
from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Output, Request, SamplingParams, Start
from stepladder.workers.engine import Engine
from stepladder.workers.scheduler import SchedulerConfig
from stepladder.workers.server.channel import Channel
from stepladder.workers.server.engine_server import EngineServer
from stepladder.workers.server.queue_limits import QueueLimits
from stepladder.workers.speculation.learning.busy_word import BusyWord

SECRET = "known to both sides"
PROMPT = tuple(range(20))
LENGTH = 40
MADE: list[Router] = []


class Served:
    """A real engine behind a real channel, in a thread."""

    def __init__(
        self,
        model: Path,
        name: str = "engine-0",
        max_queued_tokens: int = 1 << 16,
        idle_seconds: float = 0.05,
        busy: BusyWord | None = None,
        **queue: Any,
    ) -> None:
        spec = ModelSpec.load(model)
        config = SchedulerConfig(max_sequences=2, max_model_len=256, num_blocks=64, block_size=16)
        self.engine = Engine(
            config, whole_executor(spec, str(model), SingleRank(), config.num_blocks, config.block_size)
        )
        self.channel = Channel("127.0.0.1", SECRET)
        self.endpoint = Endpoint(name, 1, self.channel.address)
        self._stopping, self._gates = False, list[threading.Event]()
        limits = QueueLimits(tokens=max_queued_tokens, **queue)
        self.service = EngineServer(self.engine, self.channel, limits, idle_seconds, busy=busy)
        self._thread = threading.Thread(target=self.service.run, args=(lambda: self._stopping,), daemon=True)
        self._thread.start()

    def hold(self, after: int = 0) -> threading.Event:
        """It takes requests but runs none of them once it has generated `after` tokens, until the event is set."""
        step, go, stats = self.engine.step, self._gate(), self.engine.stats
        runs = lambda: stats.generation_tokens < after or go.wait(0.001)  # noqa: E731
        self.engine.step = lambda: step() if runs() else []  # type: ignore[method-assign]
        return go

    def stall(self) -> threading.Event:
        """An engine at work hangs in the middle of its next step, hearing and saying nothing, until the event is set.

        Returns once it does.
        """
        step, go, stalled = self.engine.step, self._gate(), threading.Event()

        def slow() -> list[Output]:
            stalled.set()
            go.wait()
            return step()

        self.engine.step = slow  # type: ignore[method-assign]
        assert stalled.wait(10), "it had nothing to do"
        return go

    def close(self) -> None:
        self._stopping = True
        for go in self._gates:
            go.set()
        self._thread.join()
        self.channel.close()

    def _gate(self) -> threading.Event:
        self._gates.append(threading.Event())
        return self._gates[-1]


@contextmanager
def served(model: Path, *names: str, **options: Any) -> Iterator[list[Served]]:
    engines = [Served(model, name, **options) for name in names or ("engine-0",)]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


def alone(model: Path) -> list[int]:
    """The tokens of `request` where nothing else happens."""

    async def scene(engine: Served) -> list[int]:
        router = await routed(engine)
        tokens = tokens_of(await collect(router))
        await router.close()
        return tokens

    with served(model) as (engine,):
        return within(scene(engine))


def request(name: str = "request-0", prompt: tuple[int, ...] = PROMPT, **params: Any) -> Request:
    fields = {"max_tokens": LENGTH, "temperature": 0.8, "seed": 5, "ignore_eos": True, **params}
    return Request(id=name, prompt=prompt, params=SamplingParams(**fields))


def unconnected(gateway: str = "gateway", secret: str = SECRET, patience: float = 10.0) -> Router:
    MADE.append(Router(gateway, secret, patience, silence=30.0))
    return MADE[-1]


async def routed(*engines: Served, gateway: str = "gateway", patience: float = 10.0) -> Router:
    """A router that has heard all of them."""
    router = unconnected(gateway, patience=patience)
    await router.update([engine.endpoint for engine in engines])
    while not all(link.alive for link in router._links.values()):
        await asyncio.sleep(0.01)
    return router


async def collect(
    router: Router, name: str = "request-0", prompt: tuple[int, ...] = PROMPT, **params: Any
) -> list[Output]:
    return [output async for output in router.generate(request(name, prompt, **params))]


async def under_way(router: Router, count: int) -> None:
    """Wait until engines have been asked for so many requests."""
    while sum(len(link.flights) for link in router._links.values()) != count:
        await asyncio.sleep(0.01)


async def waiting(engine: Served, count: int) -> None:
    """Wait until so many requests wait there for a place."""
    while len(engine.engine.scheduler.waiting) != count:
        await asyncio.sleep(0.01)


async def kill(router: Router) -> None:
    """What a SIGKILL does to its sockets: closed, and no goodbye."""
    for reader in router._readers.values():
        reader.cancel()
    for link in router._links.values():
        link.close()
    router._links.clear()


async def give_up(*tasks: asyncio.Task[Any]) -> None:
    """Their clients leave."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def starts(outputs: list[Output]) -> list[Start]:
    return [output.start for output in outputs if output.start]


def within(work: Coroutine[Any, Any, Any], seconds: float = 30.0) -> Any:
    """Run a scene; whatever became of it, no socket is left that would hold up the collection of its context."""
    try:
        return asyncio.run(asyncio.wait_for(work, seconds))
    finally:
        while MADE:
            MADE.pop()._context.destroy(linger=0)
