"""A rank of a group with an engine: it holds a slice of the model, and rank 0 serves requests."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stepladder.parallel.layers import POOLS
from stepladder.parallel.model import Transformer
from stepladder.workers import assembly
from stepladder.workers.engine import Engine, EngineStats
from stepladder.workers.executor import Executor
from stepladder.workers.figures import RankFigures, counter
from stepladder.workers.introduction import of_cache
from stepladder.workers.rank import DrafterNotice, Notice, Rank, RankConfig
from stepladder.workers.server.channel import Channel
from stepladder.workers.server.engine_server import EngineServer
from stepladder.workers.sizing import check_kv, kv_size
from stepladder.workers.speculation.learning.busy_word import BusyWord, word_name
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.learning.door import LessonDoor
from stepladder.workers.speculation.learning.ring import Ring, RingStats
from stepladder.workers.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class EngineFigures(RankFigures):
    """reduce_seconds, exposed_seconds: this rank's all-reduces, as far as they were measured. engine: on rank 0, and if
    its drafter is taught: ring, of what waits to be learnt from; door, where that is given away; word, the name of what
    tells whether it has work; refused, the version of the drafter that it was told of last, and why, if it could not
    take that."""

    reduce_seconds: float = counter(default=0.0)
    exposed_seconds: float = counter(default=0.0)
    engine: EngineStats | None = None
    ring: RingStats | None = None
    door: str | None = None
    word: str | None = None
    refused: tuple[int, str] | None = None

    def parts(self) -> Iterator[Any]:
        yield self
        yield from (part for part in (self.engine, self.ring) if part)


class EngineRank(Rank):
    """One of a tensor-parallel group that has all of the model."""

    takes_requests = True
    pools: ClassVar[tuple[str, ...]] = POOLS
    _executor: Executor

    def __init__(self, config: RankConfig) -> None:
        super().__init__(config)
        self._engine: Engine | None = None
        self._channel: Channel | None = None
        self._taught: _Taught | None = None

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
        config = self.config
        return assembly.load(self._spec, path, self._mesh, config.engine, config.balance, config.whole_experts)

    def _begin(self, kv_tokens: int) -> str | None:
        config = self.config
        tokenizer = partial(Tokenizer, config.directory)
        taught = _Taught(config, self._executor) if config.train.is_on and config.shard.rank == 0 else None
        target = taught.target if taught else None
        engine = assembly.begin(
            self._executor, config.engine, config.kv, kv_tokens, tokenizer, config.speculate, target
        )
        if taught:
            engine.capture = Capture(taught.ring.put)
        if config.shard.rank == 0:
            self._engine, self._channel, self._taught = engine, Channel(config.host, config.secret), taught
        return self.address

    def _introduction(self, kv_tokens: int) -> Iterator[str]:
        yield from super()._introduction(kv_tokens)
        if engine := self._engine:
            yield of_cache(engine.config.num_blocks * engine.config.block_size, engine.config.max_model_len)
            if drafting := engine.speculator:
                version = f", version {drafting.drafter.version}" if drafting.drafter.version else ""
                yield f"drafts by {self.config.speculate.kind}{version}"

    @property
    def _model(self) -> Transformer:
        return self._executor.model

    def tell(self, notice: Notice) -> None:
        if isinstance(notice, DrafterNotice) and self._taught and self._engine:
            self._taught.take(notice, self._engine)

    def _run(self) -> None:
        if self._engine is None or self._channel is None:
            self._executor.follow()
            return
        limits = self.config.engine.queue_limits
        word = self._taught.word if self._taught else None
        self._serve(EngineServer(self._engine, self._channel, limits, clock=self._mesh.clock, busy=word))
        self._executor.stop()
        self._channel.close()
        if self._taught:
            self._taught.close()

    def _serve(self, server: EngineServer) -> None:
        server.run(lambda: self._stopping)

    def stats(self) -> EngineFigures:
        meter, taught = self._mesh.meter, self._taught
        stats = self._engine.stats if self._engine else None
        if stats:
            stats.take_load(self._executor.model)
        figures = EngineFigures(self._mesh.clock.split(), meter.total, meter.exposed, stats)
        if taught:
            figures.ring, figures.door, figures.word = taught.ring.stats, taught.door.address, taught.word_name
            figures.refused = taught.refused
        return figures


class _Taught:
    """What an engine has whose drafter is taught by others: where its answers wait, and how other weights come."""

    def __init__(self, config: RankConfig, executor: Executor) -> None:
        self._first = config.speculate.model
        self.target = assembly.Target(executor, self._first)
        self.ring = Ring(int(config.train.ring_mb * (1 << 20)))
        self.door = LessonDoor(self.ring, config.host, config.secret)
        self.word_name = word_name(config.prefix, config.secret)
        self.word = BusyWord(self.word_name)
        self.refused: tuple[int, str] | None = None

    def take(self, notice: DrafterNotice, engine: Engine) -> None:
        """Read a version beside the one in use; the engine swaps before its next step. Not in the engine's thread."""
        assert engine.speculator
        directory = notice.directory or self._first
        try:
            cell = self.target.head(directory) if directory else None
            if notice.version and cell and cell.version != notice.version:
                raise ValueError(f"{directory} holds version {cell.version} of the drafter, not {notice.version}")
        except ValueError as error:
            log.error("version %d of the drafter is not taken: %s", notice.version, error)
            self.refused = notice.version, str(error)
        else:
            engine.speculator.staged.append(cell)
            self.refused = None

    def close(self) -> None:
        self.door.close()
        self.word.close()
