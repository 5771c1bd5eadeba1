"""A rank of a group with an engine: it holds a slice of the model, and rank 0 serves requests."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stepladder.parallel.layers import POOLS
from stepladder.workers import assembly
from stepladder.workers.engine import Engine, EngineStats
from stepladder.workers.executor import Executor
from stepladder.workers.figures import RankFigures, counter
from stepladder.workers.rank import Rank, RankConfig
from stepladder.workers.server.channel import Channel
from stepladder.workers.server.engine_server import EngineServer
from stepladder.workers.sizing import check_kv, kv_size
from stepladder.workers.text.tokenizer import Tokenizer


@dataclass
class EngineFigures(RankFigures):
    """reduce_seconds, exposed_seconds: this rank's all-reduces, as far as they were measured. engine: on rank 0."""

    reduce_seconds: float = counter(default=0.0)
    exposed_seconds: float = counter(default=0.0)
    engine: EngineStats | None = None

    def parts(self) -> Iterator[Any]:
        yield self
        if self.engine:
            yield self.engine


class EngineRank(Rank):
    """One of a tensor-parallel group that has all of the model."""

    takes_requests = True
    pools: ClassVar[tuple[str, ...]] = POOLS
    _executor: Executor

    def __init__(self, config: RankConfig) -> None:
        super().__init__(config)
        self._engine: Engine | None = None
        self._channel: Channel | None = None

    @property
    def address(self) -> str | None:
        return self._channel.address if self._channel else None

    def _load(self, path: str) -> int:
        config, device = self.config, self._mesh.device
        here = config.ranks_here, config.own_ranks_here
        check_kv(self._spec, config.kv, device, config.shard, *here)
        self._executor = self._build(path)
        return kv_size(self._executor, config.engine, config.kv, device, *here)

    def _build(self, path: str) -> Executor:
        return assembly.load(self._spec, path, self._mesh, self.config.engine, self.config.balance)

    def _begin(self, kv_tokens: int) -> str | None:
        config = self.config
        tokenizer = partial(Tokenizer, config.directory)
        engine = assembly.begin(self._executor, config.engine, config.kv, kv_tokens, tokenizer, config.speculate)
        if self.config.shard.rank == 0:
            self._engine, self._channel = engine, Channel(self.config.host, self.config.secret)
        return self.address

    def _run(self) -> None:
        if self._engine is None or self._channel is None:
            self._executor.follow()
            return
        limits = self.config.engine.queue_limits
        self._serve(EngineServer(self._engine, self._channel, limits, clock=self._mesh.clock))
        self._executor.stop()
        self._channel.close()

    def _serve(self, server: EngineServer) -> None:
        server.run(lambda: self._stopping)

    def stats(self) -> EngineFigures:
        meter = self._mesh.meter
        stats = self._engine.stats if self._engine else None
        return EngineFigures(self._mesh.clock.split(), meter.total, meter.exposed, stats)
