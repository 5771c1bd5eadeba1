"""Engines on attention ranks and an FFN pool, real groups, ranks as threads: the same tokens as the whole model."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import pytest
import torch.distributed as dist

from parallel.mesh import SingleRank
from parallel.shards import Shard
from parallel.spec import ModelSpec
from parallel.wire import PLAIN
from tests.llama import write_llama
from workers.attention import AttentionExecutor
from workers.config import AfdConfig, EngineConfig, KvConfig
from workers.core import Request, SamplingParams
from workers.engine import Engine
from workers.executor import Executor
from workers.limits import SchedulerConfig
from workers.membership import KNOCKS, Membership, PoolAddress, join_key, token
from workers.rank import FFN, RankConfig
from workers.roles import FeedForwardRank

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
    ranks: list[FeedForwardRank] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> PoolAddress:
        prefix = f"test/{self.generation}/ffn"
        for rank in range(self.size):
            config = RankConfig(
                model=str(self.path), shard=Shard(rank, self.size), prefix=prefix, host="127.0.0.1",
                ranks_here=2, device="cpu", secret=SECRET, collective_seconds=20.0, engine=EngineConfig(threads=1),
                kv=KvConfig(), generation=self.generation, role=FFN, afd=AfdConfig(),
            )  # fmt: skip
            self.ranks.append(FeedForwardRank(config))
        port = self.ranks[0].open_store()
        for rank in self.ranks:
            self.threads.append(threading.Thread(target=self._run, args=(rank, port), daemon=True))
            self.threads[-1].start()
        return PoolAddress(self.generation, f"127.0.0.1:{port}", prefix, self.size)

    def _run(self, rank: FeedForwardRank, port: int) -> None:
        rank.load("127.0.0.1", port)
        rank.run()

    def stop(self) -> None:
        self.ranks[0].stop()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def pool_of(path: Path, size: int) -> Iterator[PoolAddress]:
    pool = PoolOf(path, size)
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


def engine(spec: ModelSpec, path: Path, pool: PoolAddress, micro_batches: int | None) -> Engine:
    member = Membership(spec, "127.0.0.1", SECRET, DEADLINE, 5.0, PLAIN)
    executor = AttentionExecutor(spec, str(path), member, micro_batches, 4)
    executor.allocate(LIMITS.num_blocks, LIMITS.block_size)
    member.meet(pool)
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


def whole(spec: ModelSpec, path: Path, asked: Sequence[Request]) -> dict[str, list[int]]:
    executor = Executor(spec, str(path), SingleRank(), LIMITS.num_blocks, LIMITS.block_size)
    return run(Engine(replace(LIMITS, cache_salt=spec.wiring_key), executor), asked)


@pytest.mark.parametrize("attention, ffn, micro", [(1, 1, 1), (2, 1, 2), (1, 2, 3), (3, 2, 2), (1, 1, None)])
def test_the_tokens_of_the_whole_model(attention: int, ffn: int, micro: int | None, checkpoint: Path) -> None:
    """Each attention rank with requests of its own, which come and go at different times, one of them with none."""
    spec = ModelSpec.load(checkpoint)
    counts = [6, 3, 0][:attention]
    asked = [requests(spec, count, shift) for shift, count in enumerate(counts)]
    results: dict[int, dict[str, list[int]]] = {}

    def serve(index: int, pool: PoolAddress) -> None:
        mine = engine(spec, checkpoint, pool, micro)
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
        engines = [engine(spec, checkpoint, first, 2) for _ in asked]
        calls = count()

        def strike(*_: object) -> None:
            """In the middle of the twentieth step of the rank with one sequence."""
            if next(calls) == 20:
                process.kill()
                for one in engines:
                    one.executor.member.meet(second)  # type: ignore[attr-defined]

        engines[0].executor.model.attentions[1].register_forward_pre_hook(strike)  # type: ignore[attr-defined]
        threads = [threading.Thread(target=serve, args=one, daemon=True) for one in enumerate(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert engines[0].executor.member.resumes == 1  # type: ignore[attr-defined]
        for one in engines:
            one.executor.stop()  # type: ignore[attr-defined]
    assert results == {index: whole(spec, checkpoint, mine) for index, mine in enumerate(asked)}


def test_a_rank_that_dies_at_the_door_keeps_nobody_out(checkpoint: Path) -> None:
    """It has taken a number and no more; or it has knocked and never comes in."""
    spec = ModelSpec.load(checkpoint)
    with pool_of(checkpoint, 1) as pool:
        host, port = pool.address.split(":")
        store = dist.PrefixStore(pool.prefix, dist.TCPStore(host, int(port), None, False))
        store.add(KNOCKS, 1)
        number = store.add(KNOCKS, 1)
        store.set(join_key(number), token(SECRET, pool.prefix, number))
        mine = engine(spec, checkpoint, pool, 1)
        began = monotonic()
        assert run(mine, requests(spec, 2)) == whole(spec, checkpoint, requests(spec, 2))
        assert monotonic() - began < DEADLINE.total_seconds() / 2
        mine.executor.stop()  # type: ignore[attr-defined]


def test_who_does_not_know_the_secret_stays_outside(checkpoint: Path) -> None:
    spec = ModelSpec.load(checkpoint)
    with pool_of(checkpoint, 1) as pool:
        stranger = Membership(spec, "127.0.0.1", "another", timedelta(seconds=2), 1.0, PLAIN)
        stranger.meet(pool)
        with pytest.raises(RuntimeError, match="is lost to this rank"):
            stranger.open([3])
        mine = engine(spec, checkpoint, pool, 1)
        assert run(mine, requests(spec, 1))["0"]
        mine.executor.stop()  # type: ignore[attr-defined]
