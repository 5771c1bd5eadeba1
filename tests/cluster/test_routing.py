"""Which engine a request goes to, over real ZeroMQ."""

import asyncio
from pathlib import Path

import pytest

from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.gateway.router import WORTH
from stepladder.workers.speculation.learning.busy_word import BusyWord, BusyWords
from tests.cluster.engines import (
    LENGTH,
    Served,
    collect,
    give_up,
    routed,
    served,
    starts,
    unconnected,
    under_way,
    within,
)

CHUNK = 64  # tokens of a beginning that is remembered


def test_the_idlest_engine_is_taken(random_model: Path) -> None:
    async def scene(first: Served, second: Served) -> None:
        router = await routed(first, second)
        await asyncio.gather(*(collect(router, f"r{i}") for i in range(4)))
        counts = [engine.engine.stats.generation_tokens for engine in (first, second)]
        assert counts == [2 * LENGTH, 2 * LENGTH]
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_known_beginning_goes_where_it_is_cached(random_model: Path) -> None:
    """Also while that engine is the busier one."""
    beginning = tuple(range(2 * CHUNK))

    async def scene(*engines: Served) -> None:
        router = await routed(*engines)
        await collect(router, "r0", beginning, max_tokens=4)
        home, other = sorted(engines, key=lambda engine: -engine.engine.stats.prompt_tokens)
        go, answers = home.hold(), []
        for i in (1, 2):
            answers.append(asyncio.create_task(collect(router, f"r{i}", (*beginning, i), max_tokens=4)))
            await under_way(router, i)
        go.set()
        for outputs in await asyncio.gather(*answers):
            assert [start.cached_tokens for start in starts(outputs)] == [len(beginning)]
        assert other.engine.stats.prompt_tokens == 0
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_known_beginning_yields_to_load(random_model: Path) -> None:
    beginning = tuple(range(CHUNK))
    cost = CHUNK + 1 + LENGTH
    fitting = WORTH * CHUNK // cost + 1  # as many as come while the engine is not too busy for them

    async def scene(*engines: Served) -> None:
        router, answers = await routed(*engines), []
        for engine in engines:
            engine.hold()
        for i in range(fitting + 1):
            answers.append(asyncio.create_task(collect(router, f"r{i}", (*beginning, i))))
            await under_way(router, i + 1)
        assert sorted(len(link.flights) for link in router._links.values()) == [1, fitting]
        await give_up(*answers)
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_nobody_waits_for_long_for_an_engine_that_says_nothing(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepladder.cluster.gateway.router.FIRST_WORD_SECONDS", 0.2)

    async def scene(engine: Served) -> None:
        router = unconnected()
        silent = Endpoint("silent", 1, "tcp://127.0.0.1:9")
        await router.update([silent])
        await router.update([silent, engine.endpoint])
        while not router.ready():
            await asyncio.sleep(0.01)
        await asyncio.wait_for(collect(router, max_tokens=4), 5)
        assert engine.engine.stats.generation_tokens == 4
        await router.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_an_engine_shows_who_trains_beside_it_what_it_has(random_model: Path, tmp_path: Path) -> None:
    """Two places and three requests; then nothing any more."""

    async def scene(engine: Served, words: BusyWords) -> None:
        router = await routed(engine)
        assert words.read() == (0, 0, 0.0)
        go = engine.hold(after=10)
        answers = [asyncio.create_task(collect(router, f"r{i}")) for i in range(3)]
        while words.read()[:2] != (3, 1):
            await asyncio.sleep(0.01)
        go.set()
        await asyncio.gather(*answers)
        while words.read().requests:
            await asyncio.sleep(0.01)
        await router.close()

    word, words = BusyWord("word", tmp_path), BusyWords(tmp_path)
    words.look_at(["word"])
    with served(random_model, busy=word) as (engine,):
        within(scene(engine, words))
    word.close()
    words.close()
