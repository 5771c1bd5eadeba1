"""Engines on attention ranks and an FFN pool, real groups, ranks as threads: the same tokens as the whole model."""

import json
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import TypeVar

import pytest
import torch.distributed as dist

from stepladder.parallel.afd.control import Line
from stepladder.parallel.afd.edges import EdgeLost, GlooEdge
from stepladder.parallel.afd.sides import FeedForwardSide
from stepladder.parallel.afd.wire import FP8, PLAIN, Wire
from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.membership import JOINS, Membership, edge_name, join_key, token
from stepladder.workers.afd.pool_forward import attention_executor
from stepladder.workers.afd.ranks import AttentionRank, FeedForwardRank
from stepladder.workers.assembly import whole_executor
from stepladder.workers.config import AfdConfig, EngineConfig, KvConfig
from stepladder.workers.core import Request, SamplingParams, TokenLogprob
from stepladder.workers.engine import Engine
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.rank import ATTENTION, FFN, PoolAddress, PoolNotice, RankConfig
from stepladder.workers.roles import rank_of
from tests.llama import write_llama

T = TypeVar("T")
SECRET = "s" * 64
DEADLINE = timedelta(seconds=20)
LIMITS = SchedulerConfig(max_sequences=8, max_step_tokens=24, max_model_len=90, num_blocks=64, block_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@dataclass
class PoolOf:
    """The ranks of one life of an FFN pool, as threads."""

    path: Path
    size: int
    generation: int = 1
    seconds: float = 20.0
    wire: str = "plain"
    ranks: list[FeedForwardRank] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> PoolAddress:
        address = self.open()
        self.begin()
        return address

    def open(self) -> PoolAddress:
        """Its store is there, but nobody looks yet who asks to join."""
        prefix = f"test/{self.generation}/ffn"
        for rank in range(self.size):
            config = RankConfig(
                model=str(self.path), shard=Shard(rank, self.size), prefix=prefix, host="127.0.0.1",
                ranks_here=2, device="cpu", secret=SECRET, collective_seconds=self.seconds, kv=KvConfig(), role=FFN,
                engine=EngineConfig(threads=1), generation=self.generation, afd=AfdConfig(wire=self.wire),
            )  # fmt: skip
            self.ranks.append(FeedForwardRank(config))
        self.port = self.ranks[0].open_store()
        return PoolAddress(self.generation, f"127.0.0.1:{self.port}", prefix, self.size)

    def begin(self) -> None:
        for rank in self.ranks:
            self.threads.append(threading.Thread(target=self._run, args=(rank, self.port), daemon=True))
            self.threads[-1].start()

    def _run(self, rank: FeedForwardRank, port: int) -> None:
        rank.load("127.0.0.1", port)
        rank.run()

    def stop(self) -> None:
        self.ranks[0].stop()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def pool_of(
    path: Path, size: int, generation: int = 1, seconds: float = 20.0, wire: str = "plain"
) -> Iterator[PoolAddress]:
    pool = PoolOf(path, size, generation, seconds, wire)
    try:
        yield pool.start()
    finally:
        pool.stop()


def serve_pool(path: Path, generation: int, told: Connection) -> None:
    """A pool of one rank, as a process that can be killed."""
    pool = PoolOf(path, 1, generation)
    told.send(tuple(pool.start()))
    pool.threads[0].join()


@contextmanager
def killable(path: Path, generation: int) -> Iterator[tuple[PoolAddress, BaseProcess]]:
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve_pool, args=(path, generation, there), daemon=True)
    process.start()
    try:
        assert here.poll(60)
        yield PoolAddress(*here.recv()), process
    finally:
        process.kill()
        process.join()


def membership(
    spec: ModelSpec, pool: PoolAddress, deadline: timedelta = DEADLINE, patience: float = 5.0, wire: Wire = PLAIN
) -> Membership:
    member = Membership(spec, "127.0.0.1", SECRET, deadline, patience, wire)
    member.meet(pool)
    return member


def engine(spec: ModelSpec, path: Path, member: Membership, micro_batches: int | None) -> Engine:
    executor = attention_executor(spec, str(path), member, micro_batches, 4)
    executor.allocate(LIMITS.num_blocks, LIMITS.block_size)
    return Engine(replace(LIMITS, cache_salt=spec.wiring_key), executor)


def requests(spec: ModelSpec, count: int, shift: int = 0) -> list[Request]:
    """Greedy and seeded, prompts of unequal length, some with a common beginning, longer than a step in part."""
    made = []
    for i in range(count):
        prompt = tuple((7 * j + (i // 2 if j > 9 else shift)) % spec.vocab_size for j in range(4 + 9 * (i % 4)))
        params = SamplingParams(max_tokens=12 + i, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True)
        made.append(Request(id=str(i), prompt=prompt, params=params))
    return made


def run(engine: Engine, asked: Sequence[Request]) -> dict[str, list[int]]:
    """Requests join one after the other, at every second step."""
    waiting, tokens = list(asked), {request.id: list[int]() for request in asked}
    turn = 0
    while waiting or engine.has_work:
        if waiting and turn % 2 == 0:
            engine.add(waiting.pop(0))
        turn += 1
        for output in engine.step():
            tokens[output.id] += output.tokens
    engine.heartbeat()
    return tokens


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it does in time."""
    box: queue.Queue[T | BaseException] = queue.Queue()

    def run() -> None:
        try:
            box.put(work())
        except BaseException as error:
            box.put(error)

    threading.Thread(target=run, daemon=True).start()
    result = box.get(timeout=seconds)
    if isinstance(result, BaseException):
        raise result
    return result


def whole(spec: ModelSpec, path: Path, asked: Sequence[Request]) -> dict[str, list[int]]:
    executor = whole_executor(spec, str(path), SingleRank(), LIMITS.num_blocks, LIMITS.block_size)
    return run(Engine(replace(LIMITS, cache_salt=spec.wiring_key), executor), asked)


@pytest.mark.parametrize("attention, ffn, micro", [(1, 1, 1), (2, 1, 2), (1, 2, 3), (3, 2, 2), (1, 1, None)])
def test_the_tokens_of_the_whole_model(attention: int, ffn: int, micro: int | None, checkpoint: Path) -> None:
    """Each attention rank with requests of its own, which come and go at different times, one of them with none."""
    spec = ModelSpec.load(checkpoint)
    counts = [6, 3, 0][:attention]
    asked = [requests(spec, count, shift) for shift, count in enumerate(counts)]
    results: dict[int, dict[str, list[int]]] = {}

    def serve(index: int, pool: PoolAddress) -> None:
        mine = engine(spec, checkpoint, membership(spec, pool), micro)
        mine.heartbeat()
        results[index] = run(mine, asked[index])
        mine.executor.stop()  # type: ignore[attr-defined]

    with pool_of(checkpoint, ffn) as pool:
        threads = [threading.Thread(target=serve, args=(i, pool), daemon=True) for i in range(attention)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {index: whole(spec, checkpoint, mine) for index, mine in enumerate(asked)}


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_a_pool_that_is_killed_under_unequal_micro_batches(residual: str, checkpoint: Path) -> None:
    """One attention rank has a single sequence and is asked for an empty micro-batch; both go on with the next pool."""
    spec = replace(ModelSpec.load(checkpoint), residual=residual)
    config = json.loads((checkpoint / "config.json").read_text()) | {"residual": residual}
    (checkpoint / "config.json").write_text(json.dumps(config))
    asked = [
        [replace(one, params=replace(one.params, max_tokens=50)) for one in requests(spec, count, shift)]
        for shift, count in enumerate([1, 5])
    ]
    results: dict[int, dict[str, list[int]]] = {}

    def serve(index: int, mine: Engine) -> None:
        for request in asked[index]:
            mine.add(request)
        tokens = {request.id: list[int]() for request in asked[index]}
        while mine.has_work:
            for output in mine.step():
                tokens[output.id] += output.tokens
        mine.heartbeat()
        results[index] = tokens

    with killable(checkpoint, 1) as (first, process), killable(checkpoint, 2) as (second, _):
        engines = [engine(spec, checkpoint, membership(spec, first), 2) for _ in asked]
        calls = count()

        def strike(*_: object) -> None:
            """In the middle of the twentieth step of the rank with one sequence."""
            if next(calls) == 20:
                process.kill()
                for one in engines:
                    one.executor.forward.member.meet(second)  # type: ignore[attr-defined]

        engines[0].executor.model.modules_of_blocks[1].register_forward_pre_hook(strike)  # type: ignore[attr-defined]
        threads = [threading.Thread(target=serve, args=one, daemon=True) for one in enumerate(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert engines[0].executor.forward.member.resumes == 1  # type: ignore[attr-defined]
        for one in engines:
            one.executor.stop()  # type: ignore[attr-defined]
    assert results == {index: whole(spec, checkpoint, mine) for index, mine in enumerate(asked)}


def test_a_rank_that_dies_while_it_joins_keeps_nobody_out(checkpoint: Path) -> None:
    """It has taken a number and no more; or it has asked to join and makes no edge."""
    spec = ModelSpec.load(checkpoint)
    with pool_of(checkpoint, 1) as pool:
        host, port = pool.address.split(":")
        store = dist.PrefixStore(pool.prefix, dist.TCPStore(host, int(port), None, False))
        store.add(JOINS, 1)
        number = store.add(JOINS, 1)
        store.set(join_key(number), token(SECRET, pool.prefix, number))
        mine = engine(spec, checkpoint, membership(spec, pool), 1)
        began = monotonic()
        assert run(mine, requests(spec, 2)) == whole(spec, checkpoint, requests(spec, 2))
        assert monotonic() - began < DEADLINE.total_seconds() / 2
        mine.executor.stop()  # type: ignore[attr-defined]


def test_who_does_not_know_the_secret_is_not_admitted(checkpoint: Path) -> None:
    spec = ModelSpec.load(checkpoint)
    with pool_of(checkpoint, 1) as pool:
        stranger = Membership(spec, "127.0.0.1", "another", timedelta(seconds=2), 1.0, PLAIN)
        stranger.meet(pool)
        with pytest.raises(RuntimeError, match="is lost to this rank"):
            stranger.open([3])
        mine = engine(spec, checkpoint, membership(spec, pool), 1)
        assert run(mine, requests(spec, 1))["0"]
        mine.executor.stop()  # type: ignore[attr-defined]


def ask_to_join(pool: PoolAddress) -> tuple[dist.Store, int]:
    """As an attention rank that knows the secret; it has made no edge yet."""
    host, port = pool.address.split(":")
    store = dist.PrefixStore(pool.prefix, dist.TCPStore(host, int(port), None, False))
    number = store.add(JOINS, 1)
    store.set(join_key(number), token(SECRET, pool.prefix, number))
    return store, number


def test_a_rank_that_dies_on_its_way_from_one_ffn_rank_to_the_next_holds_nobody_up(checkpoint: Path) -> None:
    spec = ModelSpec.load(checkpoint)
    with pool_of(checkpoint, 2) as pool:
        store, number = ask_to_join(pool)
        _ends = Line(store, str(number), 0, "127.0.0.1", DEADLINE), GlooEdge(store, edge_name(number, 0), 0)
        mine = engine(spec, checkpoint, membership(spec, pool), 1)
        wanted = whole(spec, checkpoint, requests(spec, 2))
        assert within(DEADLINE.total_seconds() / 2, lambda: run(mine, requests(spec, 2))) == wanted
        mine.executor.stop()  # type: ignore[attr-defined]


def test_an_attention_rank_that_is_silent_between_steps_is_dropped_and_may_come_back(checkpoint: Path) -> None:
    """The others are held up until it counts as lost, not for ever."""
    spec, asked = ModelSpec.load(checkpoint), [requests(ModelSpec.load(checkpoint), 2, shift) for shift in range(2)]
    with pool_of(checkpoint, 2, seconds=4.0) as pool:
        silent, other = (engine(spec, checkpoint, membership(spec, pool), 1) for _ in range(2))
        for request in asked[0]:
            silent.add(request)
        begun = [output for _ in range(3) for output in silent.step()]
        assert within(20, lambda: run(other, asked[1])) == whole(spec, checkpoint, asked[1])
        tokens = {request.id: list[int]() for request in asked[0]}
        for output in [*begun, *(output for _ in iter(lambda: silent.has_work, False) for output in silent.step())]:
            tokens[output.id] += output.tokens
        assert tokens == whole(spec, checkpoint, asked[0])
        for one in (silent, other):
            one.executor.stop()  # type: ignore[attr-defined]


def test_an_attention_rank_that_is_silent_in_a_step_is_dropped(checkpoint: Path) -> None:
    spec, asked = ModelSpec.load(checkpoint), requests(ModelSpec.load(checkpoint), 2)
    with pool_of(checkpoint, 1, seconds=4.0) as pool:
        silent = membership(spec, pool)
        _link = within(20, lambda: silent.open([3]))  # and sends nothing
        other = engine(spec, checkpoint, membership(spec, pool), 1)
        assert within(20, lambda: run(other, asked)) == whole(spec, checkpoint, asked)
        other.executor.stop()  # type: ignore[attr-defined]


def test_a_pool_that_is_silent_is_given_up_when_another_is_named(checkpoint: Path) -> None:
    """By a rank in the middle of a step, by one that begins a step, and by one that has nothing to do."""
    spec, asked = ModelSpec.load(checkpoint), [requests(ModelSpec.load(checkpoint), 2, shift) for shift in range(3)]
    with killable(checkpoint, 1) as (first, process), pool_of(checkpoint, 1, generation=2) as second:
        engines = [engine(spec, checkpoint, membership(spec, first), 1) for _ in asked]
        for one in engines[1:]:
            run(one, asked[0])  # joins, and is idle again
        hit, calls = threading.Event(), count()

        def strike(*_: object) -> None:
            if next(calls) == 10:
                assert process.pid
                os.kill(process.pid, signal.SIGSTOP)
                hit.set()

        def name_the_second() -> None:
            for one in engines:
                one.executor.forward.member.meet(second)  # type: ignore[attr-defined]

        def rest_then_work() -> dict[str, list[int]]:
            for _ in range(3):
                engines[2].heartbeat()
            return run(engines[2], asked[2])

        engines[0].executor.model.modules_of_blocks[1].register_forward_pre_hook(strike)  # type: ignore[attr-defined]
        with ThreadPoolExecutor(3) as threads, ExitStack() as stack:
            stack.callback(name_the_second)  # or the threads would be waited for in vain, should this fail
            stack.callback(process.kill)
            results = [threads.submit(run, engines[0], asked[0])]
            assert hit.wait(20)
            results += [threads.submit(run, engines[1], asked[1]), threads.submit(rest_then_work)]
            assert len(wait(results, timeout=0.5).not_done) == len(results)
            signs, member = threading.Event(), engines[1].executor.forward.member  # type: ignore[attr-defined]
            member.sign = signs.set
            member.meet(None)
            assert signs.wait(10), "it waits for a pool that is gone instead of the next one"
            name_the_second()
            assert not wait(results, timeout=DEADLINE.total_seconds() / 2).not_done
        assert [one.result() for one in results] == [whole(spec, checkpoint, mine) for mine in asked]
        for one in engines:
            one.executor.stop()  # type: ignore[attr-defined]


def test_a_pool_that_was_too_busy_to_open_its_door_is_tried_again(checkpoint: Path) -> None:
    spec, asked = ModelSpec.load(checkpoint), requests(ModelSpec.load(checkpoint), 2)
    pool = PoolOf(checkpoint, 1)
    address = pool.open()
    try:
        mine = engine(spec, checkpoint, membership(spec, address, timedelta(seconds=1.5), patience=40.0), 1)
        with ThreadPoolExecutor(1) as thread:
            tokens = thread.submit(run, mine, asked)
            host, port = address.address.split(":")
            store = dist.PrefixStore(address.prefix, dist.TCPStore(host, int(port), None, False))
            until, pause = monotonic() + 15, threading.Event()
            while store.add(JOINS, 0) < 2 and monotonic() < until:
                pause.wait(0.05)
            pool.begin()
            assert tokens.result(30) == whole(spec, checkpoint, asked)
        mine.executor.stop()  # type: ignore[attr-defined]
    finally:
        pool.stop()


def test_another_wire_is_refused_in_one_sentence_and_the_pool_goes_on(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, asked = ModelSpec.load(checkpoint), requests(ModelSpec.load(checkpoint), 1)
    with pool_of(checkpoint, 2, seconds=4.0) as pool, caplog.at_level(logging.WARNING):
        stranger = membership(spec, pool, patience=1.0, wire=FP8)
        with pytest.raises(EdgeLost, match=r"is lost to this rank.*give all ranks the same wires"):
            within(10, lambda: stranger.open([3]))
        said = [
            r
            for r in caplog.records
            if "the same wires" in r.getMessage() and r.name == "stepladder.workers.afd.membership"
        ]
        assert len(said) == 1
        mine = engine(spec, checkpoint, membership(spec, pool), 1)
        assert within(20, lambda: run(mine, asked)) == whole(spec, checkpoint, asked)
        mine.executor.stop()  # type: ignore[attr-defined]


def test_a_pool_that_cannot_share_the_ffns_says_what_to_change(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"intermediate_size is 48, which 49 .* cannot share; .* layout\.ffn"):
        FeedForwardSide(ModelSpec.load(checkpoint), Shard(0, 49))


def attention_rank(path: Path, pool: PoolAddress, **afd: object) -> AttentionRank:
    config = RankConfig(
        model=str(path), shard=Shard(), prefix="test/1/engine-0", host="127.0.0.1", ranks_here=2, device="cpu",
        secret=SECRET, collective_seconds=20.0, engine=EngineConfig(threads=1, max_sequences=4, max_step_tokens=32),
        kv=KvConfig(tokens=256, block_size=4), role=ATTENTION, afd=AfdConfig(**afd),  # type: ignore[arg-type]
    )  # fmt: skip
    rank = rank_of(config)
    assert isinstance(rank, AttentionRank)
    rank.begin(rank.load("127.0.0.1", rank.open_store()))
    rank.tell(PoolNotice(pool))
    return rank


def prompt_logprobs(engine: Engine, asked: Sequence[Request]) -> list[float]:
    """Of all prompts, which are in the same steps."""
    for request in asked:
        engine.add(replace(request, params=SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)))
    found: dict[str, list[TokenLogprob]] = {}
    while engine.has_work:
        found |= {output.id: output.prompt_logprobs or [] for output in engine.step()}
    return [one.logprob for request in asked for one in found[request.id]]


def test_ping_pong_and_the_fp8_wire_as_a_deployment_asks_for_them(tmp_path: Path) -> None:
    """Micro-batches of an attention rank that is built from its configuration; fp8 costs a little, and nothing else."""
    path = write_llama(tmp_path)
    spec = ModelSpec.load(path)
    asked = requests(spec, 4, shift=3)
    exact = prompt_logprobs(Engine(LIMITS, whole_executor(spec, str(path), SingleRank(), 64, 4)), asked)
    pool = PoolOf(path, 1, wire="fp8")
    try:
        rank = attention_rank(path, pool.start(), schedule="pingpong", micro_batches=2, wire="fp8")
        mine = rank._engine
        assert mine and rank._channel
        found = within(20, lambda: prompt_logprobs(mine, asked))
        steps, side = pool.ranks[0]._pool.steps, pool.ranks[0]._pool.side
        assert rank.stats().micro_batches == 2 and side.calls > steps * spec.num_layers
        rank._executor.stop()
        rank._channel.close()
    finally:
        pool.stop()
    off = [abs(a - b) for a, b in zip(found, exact, strict=True)]
    assert len(exact) == sum(len(one.prompt) - 1 for one in asked)
    assert max(off) > 1e-5 and sum(off) / len(off) < 0.2
