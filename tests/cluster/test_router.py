"""Router and engine service over real ZeroMQ: replays, retries, refusals, and who may talk at all."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from cluster.errors import Overloaded
from cluster.inflight import InFlightRequest
from cluster.protocol import CompletionRequest
from cluster.router import Router
from cluster.service import Service, ServiceConfig
from cluster.wire import Endpoint
from parallel.mesh import SingleRank
from parallel.spec import ModelSpec
from workers.channel import Channel
from workers.core import Output, Request, SamplingParams, Start
from workers.engine import Engine
from workers.executor import Executor
from workers.scheduler import SchedulerConfig
from workers.service import EngineService
from workers.text import Tokenizer

SECRET = "known to both sides"
PROMPT = tuple(range(20))
LENGTH = 40
MADE: list[Router] = []


class Served:
    """A real engine behind a real channel, in a thread."""

    def __init__(self, model: Path, name: str = "engine-0", max_queued_tokens: int = 1 << 16) -> None:
        spec = ModelSpec.load(model)
        config = SchedulerConfig(max_sequences=2, max_model_len=256, num_blocks=64, block_size=16)
        self.engine = Engine(config, Executor(spec, str(model), SingleRank(), config.num_blocks, config.block_size))
        self.channel = Channel("127.0.0.1", SECRET)
        self.endpoint = Endpoint(name, 1, self.channel.address)
        self._stopping = False
        service = EngineService(self.engine, self.channel, max_queued_tokens, idle_seconds=0.05)
        self._thread = threading.Thread(target=service.run, args=(lambda: self._stopping,), daemon=True)
        self._thread.start()

    def hold(self) -> threading.Event:
        """It takes requests but runs none of them, until the event is set."""
        step, go = self.engine.step, threading.Event()
        self.engine.step = lambda: step() if go.wait(0.001) else []  # type: ignore[method-assign]
        return go

    def close(self) -> None:
        self._stopping = True
        self._thread.join()
        self.channel.close()


@contextmanager
def served(model: Path, *names: str, **options: int) -> Iterator[list[Served]]:
    engines = [Served(model, name, **options) for name in names or ("engine-0",)]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


@pytest.fixture(scope="module")
def expected(random_model: Path) -> list[int]:
    with served(random_model) as (engine,):
        return within(collect_alone(engine))


async def collect_alone(engine: Served) -> list[int]:
    router = await routed(engine)
    tokens = [token for output in await collect(router) for token in output.tokens]
    await router.close()
    return tokens


def request(name: str = "request-0", **params: Any) -> Request:
    fields = {"max_tokens": LENGTH, "temperature": 0.8, "seed": 5, "ignore_eos": True, **params}
    return Request(id=name, prompt=PROMPT, params=SamplingParams(**fields))


async def routed(*engines: Served, gateway: str = "gateway", silence: float = 30.0) -> Router:
    router = Router(gateway, SECRET, patience=10, silence=silence)
    MADE.append(router)
    await router.update([engine.endpoint for engine in engines])
    while not all(link.alive for link in router._links.values()):
        await asyncio.sleep(0.01)
    return router


async def collect(router: Router, name: str = "request-0", **params: Any) -> list[Output]:
    return [output async for output in router.generate(request(name, **params))]


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


def test_a_lost_engine_is_replaced_in_the_middle(random_model: Path, expected: list[int]) -> None:
    async def scene(first: Served, second: Served) -> None:
        router = await routed(first)
        outputs = []
        async for output in router.generate(request()):
            outputs.append(output)
            if len(outputs) == 10:
                await router.update([second.endpoint])
        assert tokens_of(outputs) == expected
        assert [o.finish_reason for o in outputs][-1] == "length" and router.replays == 1
        assert 0 < second.engine.stats.generation_tokens < LENGTH, "the second engine went on, it did not start again"
        assert starts(outputs) == [outputs[0].start], "of the attempt that gave the first token, and once"
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_request_waits_for_an_engine_that_comes_back(random_model: Path, expected: list[int]) -> None:
    async def scene(first: Served, second: Served) -> None:
        router = await routed(first)
        outputs = []
        async for output in router.generate(request()):
            outputs.append(output)
            if len(outputs) == 10:
                await router.update([])
                asyncio.get_running_loop().call_later(
                    0.2, lambda: asyncio.ensure_future(router.update([second.endpoint]))
                )
        assert tokens_of(outputs) == expected
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_retry_after_a_lost_gateway_continues(random_model: Path, expected: list[int]) -> None:
    async def scene(engine: Served) -> None:
        router = await routed(engine, gateway="first")
        async with aclosing(router.generate(request())) as outputs:
            got = [await anext(outputs) for _ in range(5)]
            await kill(router)
        assert tokens_of(got) == expected[:5]
        second = await routed(engine, gateway="second")
        while not any(link.orphans for link in second._links.values()):
            await asyncio.sleep(0.01)
        retried = await collect(second, seed=99)
        assert tokens_of(retried) == expected, "with the seed it began with"
        assert starts(got) == [got[0].start] and not starts(retried), "the first gateway was told"
        assert engine.engine.stats.generation_tokens == LENGTH, "nothing was generated twice"
        assert tokens_of(await collect(second, "another")) == expected
        await second.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_the_queue_time_is_that_of_the_engine_that_answered(random_model: Path, expected: list[int]) -> None:
    async def scene(first: Served, second: Served) -> None:
        router, go = await routed(first), first.hold()
        began, answer = monotonic(), asyncio.create_task(collect(router))
        while not first.engine.has_work:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        await router.update([second.endpoint])
        outputs = await answer
        (start,) = starts(outputs)
        assert tokens_of(outputs) == expected and outputs[0].start is start
        assert start.queue_seconds + start.prefill_seconds < monotonic() - began - 0.3
        go.set()
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_retry_that_finds_its_request_queued_is_measured_once(random_model: Path) -> None:
    """The first thing that its new gateway hears is that there is nothing yet."""

    async def scene(engine: Served) -> None:
        first, go = await routed(engine, gateway="first"), engine.hold()
        waiting = asyncio.create_task(collect(first))
        while not engine.engine.has_work:
            await asyncio.sleep(0.01)
        waiting.cancel()  # with its gateway, which can tell nobody
        await kill(first)
        second = await routed(engine, gateway="second")
        (link,) = second._links.values()
        while not link.orphans:
            await asyncio.sleep(0.01)
        service = service_of(second, random_model)
        body = {"model": "m", "prompt": list(PROMPT), "max_tokens": LENGTH, "ignore_eos": True}
        generation = await service.completion(CompletionRequest(**body), InFlightRequest("request"))
        answer = asyncio.create_task(service.run(generation))
        while link.orphans:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        go.set()
        assert (await answer)["usage"]["completion_tokens"] == LENGTH

        def value(name: str) -> float:
            return service.metrics.registry.get_sample_value(f"stepladder:{name}", {"model_name": "m"}) or 0.0

        assert value("prompt_tokens_total") == len(PROMPT)
        for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "request_inference_time_seconds"):
            assert value(f"{name}_count") == 1
        assert value("time_to_first_token_seconds_sum") > 0.1, "from the token, not from the news that there is none"
        assert value("request_queue_time_seconds_sum") > 0.1
        await second.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def service_of(router: Router, model: Path) -> Service:
    vocab_size = ModelSpec.load(model).vocab_size
    config = ServiceConfig(model_name="m", max_model_len=256, vocab_size=vocab_size, version="1")
    return Service(router, Tokenizer(model), config)


async def kill(router: Router) -> None:
    """What a SIGKILL does to its sockets: closed, and no goodbye."""
    for tasks in router._tasks.values():
        for task in tasks:
            task.cancel()
    for link in router._links.values():
        link.close()
    router._links.clear()


def test_lost_messages_are_noticed_and_replayed(random_model: Path, expected: list[int]) -> None:
    async def scene(engine: Served) -> None:
        router = await routed(engine)
        outputs = []
        async for output in router.generate(request()):
            outputs.append(output)
            if len(outputs) == 10:
                (link,) = router._links.values()
                link._heard -= 1  # as if one had been skipped
        assert tokens_of(outputs) == expected and router.replays == 1
        await router.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_closing_the_generator_aborts(random_model: Path) -> None:
    async def scene(engine: Served) -> None:
        router = await routed(engine)
        async with aclosing(router.generate(request(max_tokens=200))) as outputs:
            await anext(outputs)
            assert engine.engine.has_work
        while engine.engine.has_work:
            await asyncio.sleep(0.01)
        assert engine.engine.stats.generation_tokens < 200
        await router.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_refusals_have_their_reasons(random_model: Path) -> None:
    async def scene(engine: Served) -> None:
        router = await routed(engine)
        with pytest.raises(ValueError, match="exceed this model's context of 256 tokens"):
            await collect(router, max_tokens=250)
        answers = await asyncio.gather(*(collect(router, f"r{i}") for i in range(12)), return_exceptions=True)
        full = [a for a in answers if isinstance(a, Overloaded)]
        assert full and len(full) < 12 and all("queue is full" in str(a) for a in full)
        await router.close()

    with served(random_model, max_queued_tokens=60) as (engine,):
        within(scene(engine))


def test_nobody_without_the_secret_is_heard(random_model: Path) -> None:
    async def scene(engine: Served) -> None:
        stranger = Router("stranger", "guessed")
        MADE.append(stranger)
        await stranger.update([engine.endpoint])
        friend = await routed(engine, gateway="friend")
        assert len(await collect(friend)) == LENGTH
        assert not stranger.ready() and len(engine.channel.gateways) == 1
        await friend.close()
        await stranger.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_the_idlest_engine_is_taken(random_model: Path) -> None:
    async def scene(first: Served, second: Served) -> None:
        router = await routed(first, second)
        await asyncio.gather(*(collect(router, f"r{i}") for i in range(4)))
        counts = [engine.engine.stats.generation_tokens for engine in (first, second)]
        assert counts == [2 * LENGTH, 2 * LENGTH]
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))
