"""A client that asks again under the id of a request whose gateway was lost, over real ZeroMQ."""

import asyncio
import json
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from stepladder.cluster.gateway.inflight import InFlightRequest
from stepladder.cluster.gateway.openai_service import OpenAIService
from stepladder.cluster.gateway.protocol import CompletionRequest
from stepladder.cluster.gateway.router import Router
from stepladder.cluster.gateway.service_config import ServiceConfig
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.text.tokenizer import Tokenizer
from tests.cluster.engines import (
    LENGTH,
    PROMPT,
    Served,
    alone,
    collect,
    give_up,
    kill,
    request,
    routed,
    served,
    starts,
    tokens_of,
    unconnected,
    waiting,
    within,
)


@pytest.fixture(scope="module")
def expected(random_model: Path) -> list[int]:
    return alone(random_model)


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


def test_a_retry_that_finds_its_request_queued_is_measured_once(random_model: Path) -> None:
    """The first thing that its new gateway hears is that there is nothing yet."""

    async def scene(engine: Served) -> None:
        second, go = await lost_in_the_queue(engine)
        (link,) = second._links.values()
        service = service_of(second, random_model)
        body = {"model": "m", "prompt": list(PROMPT), "max_tokens": LENGTH, "temperature": 0.8, "ignore_eos": True}
        generation = await service.completion(CompletionRequest(**body), InFlightRequest("request"))
        answer = asyncio.create_task(service.run(generation))
        while link.orphans:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        go.set()
        assert json.loads(await answer)["usage"]["completion_tokens"] == LENGTH

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


def service_of(router: Router, model: Path) -> OpenAIService:
    vocab_size = ModelSpec.load(model).vocab_size
    config = ServiceConfig(model_name="m", max_model_len=256, vocab_size=vocab_size, version="1")
    return OpenAIService(router, Tokenizer(model), config)


async def lose(gateway: Router, answer: asyncio.Task[Any]) -> None:
    """The gateway dies with the client's stream, and can tell nobody."""
    answer.cancel()
    await kill(gateway)


async def lost_in_the_queue(engine: Served) -> tuple[Router, threading.Event]:
    """A second gateway that has heard of a request whose gateway was lost before it began, and what lets it begin."""
    first, go = await routed(engine, gateway="first"), engine.hold()
    lost = asyncio.create_task(collect(first))
    await waiting(engine, 1)
    await lose(first, lost)
    second = await routed(engine, gateway="second")
    while not any(link.orphans for link in second._links.values()):
        await asyncio.sleep(0.01)
    return second, go


def test_a_retry_that_asks_otherwise_starts_again(random_model: Path, expected: list[int]) -> None:
    """The first attempt lives on under the same id, and has no log-probabilities to give."""

    async def scene(engine: Served) -> None:
        second, go = await lost_in_the_queue(engine)
        answer = asyncio.create_task(collect(second, prompt_logprobs=1))
        await waiting(engine, 2)
        go.set()
        outputs = await answer
        assert tokens_of(outputs) == expected and len(starts(outputs)) == 1
        assert len(outputs[0].prompt_logprobs or ()) == len(PROMPT) - 1
        await second.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_two_gateways_may_use_one_id(random_model: Path, expected: list[int]) -> None:
    """As when a gateway that is about to be found dead has asked for the request that is tried again."""

    async def scene(engine: Served) -> None:
        first, second = await routed(engine, gateway="first"), await routed(engine, gateway="second")
        go = engine.hold()
        leaves, stays = asyncio.create_task(collect(first)), asyncio.create_task(collect(second))
        await waiting(engine, 2)
        await give_up(leaves)
        await waiting(engine, 1)
        go.set()
        assert tokens_of(await stays) == expected
        await first.close()
        await second.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_a_new_gateway_hears_of_orphans_at_once(random_model: Path) -> None:
    """The engine finds out that the old one is gone as it answers the new one."""

    async def scene(engine: Served) -> None:
        first = await routed(engine, gateway="first")
        engine.hold()
        lost = asyncio.create_task(collect(first))
        await waiting(engine, 1)
        await lose(first, lost)
        while connections(engine):
            await asyncio.sleep(0.01)
        second = await routed(engine, gateway="second")
        assert [link.orphans for link in second._links.values()] == [{"request-0"}]
        await second.close()

    with served(random_model, idle_seconds=20.0) as (engine,):
        within(scene(engine))


def connections(engine: Served) -> list[Any]:
    """Those that the engine has not closed."""
    port = int(engine.endpoint.address.rsplit(":", 1)[1])
    all_ = psutil.Process().net_connections("tcp")
    return [c for c in all_ if c.laddr.port == port and c.status != psutil.CONN_LISTEN]


def test_a_retry_waits_until_its_engine_has_said_whom_it_has(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepladder.cluster.gateway.router.FIRST_WORD_SECONDS", 20.0)

    async def scene(home: Served, other: Served) -> None:
        first = await routed(home, gateway="first")
        async with aclosing(first.generate(request(max_tokens=200))) as outputs:
            got = tokens_of([await anext(outputs) for _ in range(5)])
            go = home.stall()
            await kill(first)
        second = unconnected("second")
        await second.update([home.endpoint, other.endpoint])
        while not second.ready():
            await asyncio.sleep(0.01)
        answer = asyncio.create_task(collect(second, max_tokens=200))
        while not second._wanted:
            await asyncio.sleep(0.01)
        go.set()
        assert tokens_of(await answer)[:5] == got
        assert home.engine.stats.generation_tokens == 200 and other.engine.stats.prompt_tokens == 0
        await second.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))
