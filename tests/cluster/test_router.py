"""Router and engine service over real ZeroMQ: replays, refusals, and who may talk at all."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest

from stepladder.cluster.config import ClusterConfig, Deployment, ModelConfig
from stepladder.cluster.gateway.errors import BadRequest, Overloaded, Unavailable
from stepladder.cluster.gateway.router import Router
from stepladder.workers.core import Request
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.learning.lessons import Captured, number_of
from tests.cluster.engines import (
    LENGTH,
    PROMPT,
    SECRET,
    Served,
    alone,
    collect,
    give_up,
    request,
    routed,
    served,
    starts,
    tokens_of,
    unconnected,
    under_way,
    waiting,
    within,
)


@pytest.fixture(scope="module")
def expected(random_model: Path) -> list[int]:
    return alone(random_model)


def test_a_lost_engine_is_replaced_in_the_middle(random_model: Path, expected: list[int]) -> None:
    async def scene(first: Served, second: Served) -> None:
        router, outputs = await routed(first), []
        first.hold(after=10)
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


@pytest.mark.parametrize("learn", [True, False])
def test_a_replay_is_learnt_from_as_its_request_says(random_model: Path, learn: bool) -> None:
    """Under the same domain and number wherever it is served; or nowhere."""
    captured: tuple[list[Captured], list[Captured]] = ([], [])

    async def scene(first: Served, second: Served) -> None:
        for engine, kept in zip((first, second), captured, strict=True):
            engine.engine.capture = Capture(kept.append)
        router, outputs = await routed(first), []
        first.hold(after=10)
        async for output in router.generate(replace(request(), domain="tables", learn=learn)):
            outputs.append(output)
            if len(outputs) == 10:
                await router.update([second.endpoint])
        await router.close()
        first.engine.abort(first.engine.scheduler.running[0].request.id)
        found = [(one.domain, one.request, one.lesson.tokens.tolist()) for one in (*captured[0], *captured[1])]
        domain, number, tokens = "tables", number_of(request()), tokens_of(outputs)
        assert found == ([(domain, number, tokens[:10]), (domain, number, tokens[10:])] if learn else [])

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_request_waits_for_an_engine_that_comes_back(random_model: Path, expected: list[int]) -> None:
    async def scene(first: Served, second: Served) -> None:
        router, outputs = await routed(first), []
        first.hold(after=10)
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


def test_requests_that_were_lost_together_give_up_together(random_model: Path) -> None:
    async def scene(engine: Served) -> None:
        router = await routed(engine, patience=0.3)
        engine.hold()
        answers = [asyncio.create_task(collect(router, f"r{i}")) for i in range(5)]
        await under_way(router, 5)
        began = monotonic()
        await router.update([])
        for error in await asyncio.gather(*answers, return_exceptions=True):
            assert isinstance(error, Unavailable) and "none has come back within 0.3 s" in error.message
        assert 0.3 <= monotonic() - began < 1.2, "one after another they would take 1.5 s"
        await router.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_patience_is_as_long_as_an_engine_may_take_to_come_back(tmp_path: Path) -> None:
    cluster = ClusterConfig(ping_seconds=1.0, hang_seconds=8.0, start_seconds=100.0)
    model = ModelConfig(path=str(tmp_path), name="m")
    router = Router.of("gateway", Deployment(name="d", run_dir="/", secret=SECRET, model=model, cluster=cluster))
    assert (router._patience, router._silence) == (109.0, 24.0)
    router._context.destroy()


def test_a_request_whose_client_leaves_while_it_waits_for_an_engine_is_not_replayed(random_model: Path) -> None:
    async def scene(first: Served, second: Served) -> None:
        router = await routed(first)
        first.hold()
        answer = asyncio.create_task(collect(router, "ghost"))
        await under_way(router, 1)
        await router.update([])
        await give_up(answer)
        await router.update([second.endpoint])
        while not router.ready() or router._background:
            await asyncio.sleep(0.01)
        await collect(router)
        assert second.engine.stats.prompt_tokens == len(PROMPT), "of one request"
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


def test_a_replay_is_not_refused_where_the_queue_is_full(random_model: Path) -> None:
    async def scene(first: Served, second: Served) -> None:
        router, other = await routed(first), await routed(second, gateway="other")
        first.hold()
        go = second.hold()
        replayed = asyncio.create_task(collect(router))
        others = [asyncio.create_task(collect(other, f"r{i}")) for i in range(3)]
        await under_way(router, 1)
        await waiting(second, 3)
        await router.update([second.endpoint])
        await waiting(second, 4)
        with pytest.raises(Overloaded, match="queue is full"):
            await collect(other, "new")
        go.set()
        assert [len(tokens_of(outputs)) for outputs in await asyncio.gather(replayed, *others)] == [LENGTH] * 4
        await router.close()
        await other.close()

    with served(random_model, "engine-0", "engine-1", max_queued_tokens=3 * len(PROMPT)) as engines:
        within(scene(*engines))


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


def never_sent() -> Request:
    """msgpack has no such integer."""
    return replace(request("odd"), prompt=(2**70,))


def never_read() -> Request:
    """It is sent, but an engine takes no such top_k."""
    odd = request("odd")
    object.__setattr__(odd.params, "top_k", 50.5)
    return odd


@pytest.mark.parametrize("odd, sentence", [(never_sent, "cannot be sent"), (never_read, "Expected `int`, got `float`")])
def test_a_request_that_does_not_fit_the_wire_is_refused_and_felt_by_nobody(
    random_model: Path, expected: list[int], odd: Callable[[], Request], sentence: str
) -> None:
    async def scene(engine: Served) -> None:
        router, outputs = await routed(engine), []
        async for output in router.generate(request()):
            outputs.append(output)
            if len(outputs) == 10:
                with pytest.raises(BadRequest, match=sentence):
                    _ = [one async for one in router.generate(odd())]
        assert tokens_of(outputs) == expected and router.replays == 0
        assert tokens_of(await collect(router, "another")) == expected, "the numbers of messages go on"
        (link,) = router._links.values()
        assert link.load == 0 and not link.flights
        await router.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_a_request_that_ends_engines_is_given_up_after_three(random_model: Path, expected: list[int]) -> None:
    async def scene(*engines: Served) -> None:
        gates, router = [engine.hold() for engine in engines], await routed(engines[0])
        answer = asyncio.create_task(collect(router))
        for engine in engines[1:]:
            await under_way(router, 1)
            await router.update([engine.endpoint])
        with pytest.raises(Unavailable, match="3 engines in a row were lost while they worked on this request"):
            await answer
        assert router.replays == 2
        while not router.ready():
            await asyncio.sleep(0.01)
        gates[-1].set()
        assert tokens_of(await collect(router)) == expected
        await router.close()

    with served(random_model, *(f"engine-{i}" for i in range(4))) as engines:
        within(scene(*engines))


def test_a_request_that_gets_on_in_every_life_is_not_given_up(random_model: Path, expected: list[int]) -> None:
    async def scene(*engines: Served) -> None:
        router, outputs = await routed(engines[0]), []
        for engine in engines[:-1]:
            engine.hold(after=5)
        async for output in router.generate(request()):
            outputs.append(output)
            if (count := len(tokens_of(outputs))) in (5, 10, 15, 20):
                await router.update([engines[count // 5].endpoint])
        assert tokens_of(outputs) == expected and router.replays == 4
        await router.close()

    with served(random_model, *(f"engine-{i}" for i in range(5))) as engines:
        within(scene(*engines))


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
        with pytest.raises(BadRequest, match="exceed this model's context of 256 tokens"):
            await collect(router, max_tokens=250)
        answers = await asyncio.gather(*(collect(router, f"r{i}") for i in range(12)), return_exceptions=True)
        full = [a for a in answers if isinstance(a, Overloaded)]
        assert full and len(full) < 12 and all("queue is full" in str(a) for a in full)
        await router.close()

    with served(random_model, max_queued_tokens=60) as (engine,):
        within(scene(engine))


def test_an_overloaded_engine_serves_those_it_accepts_and_tells_the_others_when_to_come(random_model: Path) -> None:
    """Eight times what it can do: nobody waits for longer than it says, and whoever leaves, leaves the queue."""

    async def scene(engine: Served) -> None:
        router = await routed(engine)

        async def ask(index: int) -> tuple[float, Exception | None]:
            await asyncio.sleep(index * 0.004)
            began = monotonic()
            try:
                await collect(router, f"r{index}", max_tokens=20)
            except Overloaded as error:
                return monotonic() - began, error
            return monotonic() - began, None

        found = await asyncio.gather(*map(ask, range(1500)))
        served = [seconds for seconds, error in found if error is None]
        late = [error for _, error in found if error and "a place would come after about" in error.message]
        assert len(late) > 100 and len(served) > 20
        assert all(error.retry_after and 1.0 <= error.retry_after < 20 for error in late)
        assert max(served[len(served) // 2 :]) < 10 * 1.0, "the limit is one second"
        await router.close()

    with served(random_model, requests=10_000, seconds=1.0) as (engine,):
        within(scene(engine), seconds=100)


def test_the_time_that_a_client_gives_travels_with_its_request(random_model: Path) -> None:
    async def scene(engine: Served) -> None:
        router, go = await routed(engine), engine.hold()
        first = asyncio.create_task(collect(router, "first"))
        await waiting(engine, 1)
        engine.service._queue.pace.stepped(10, 2.0)  # 5 tokens/s
        with pytest.raises(Overloaded, match="more than 3"):
            _ = [one async for one in router.generate(request("hasty"), monotonic() + 3.0)]
        go.set()
        await first
        await router.close()

    with served(random_model) as (engine,):
        within(scene(engine))


def test_nobody_without_the_secret_is_heard(random_model: Path) -> None:
    async def scene(engine: Served) -> None:
        stranger = unconnected("stranger", "guessed")
        await stranger.update([engine.endpoint])
        friend = await routed(engine, gateway="friend")
        assert len(await collect(friend)) == LENGTH
        assert not stranger.ready() and len(engine.channel.gateways) == 1
        await friend.close()
        await stranger.close()

    with served(random_model) as (engine,):
        within(scene(engine))
