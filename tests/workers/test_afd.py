"""Engines on attention ranks and an FFN pool, real groups, ranks as threads: the same tokens as the whole model."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest

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
from workers.membership import Membership, PoolAddress
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
