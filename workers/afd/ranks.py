"""Ranks of a disaggregated model: those with attention, which have engines, and those with FFNs, which have none."""

from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from stepladder.parallel.afd.sides import FeedForwardSide
from stepladder.parallel.afd.wire import wire_to_ffn
from stepladder.parallel.balance import place_of
from stepladder.parallel.model import Transformer
from stepladder.parallel.wiring import ATTENTION, FFN
from stepladder.workers.afd.membership import Membership
from stepladder.workers.afd.micro_batches import fixed_number
from stepladder.workers.afd.pool import FeedForwardPool
from stepladder.workers.afd.pool_forward import PoolForward, attention_executor
from stepladder.workers.assembly import fill
from stepladder.workers.engine_rank import EngineFigures, EngineRank
from stepladder.workers.executor import Executor
from stepladder.workers.expert_load import ExpertLoad
from stepladder.workers.figures import RankFigures, counter, gauge, limit
from stepladder.workers.rank import UNBOUNDED, Notice, PoolNotice, Rank
from stepladder.workers.server.engine_server import EngineServer


@dataclass
class AttentionFigures(EngineFigures):
    """pool_wait_seconds: of waiting for F. pool_resumes: steps that went on with another pool; pool_resumed_block: the
    first block that the last such pool computed, -1 without one. micro_batches: of a step, 0 until it is measured."""

    pool_wait_seconds: float = counter(default=0.0, each=True)
    pool_resumes: int = counter()
    pool_resumed_block: int = limit(default=-1)
    micro_batches: int = gauge(across="none", each=True)


@dataclass
class PoolFigures(ExpertLoad, RankFigures):
    """steps: begun, on the first rank; resumed_steps: of those, how many another pool had begun. busy_seconds: inside
    FFNs. native_kernels: 1 if it computes with native CPU kernels, 0 if with plain torch."""

    steps: int = counter()
    resumed_steps: int = counter()
    busy_seconds: float = counter(default=0.0)
    native_kernels: int = limit()


class AttentionRank(EngineRank):
    """A rank that holds attention, KV cache, embedding and head, with an engine of its own."""

    pools = (ATTENTION,)

    @property
    def _forward(self) -> PoolForward:
        return cast(PoolForward, self._executor.forward)

    def tell(self, notice: Notice) -> None:
        if isinstance(notice, PoolNotice):
            self._forward.member.meet(notice.pool)
        else:
            super().tell(notice)

    def stats(self) -> AttentionFigures:
        forward, common = self._forward, super().stats()
        member = forward.member
        return AttentionFigures(
            **vars(common),
            pool_wait_seconds=forward.waited,
            pool_resumes=member.resumes,
            pool_resumed_block=member.resumed_block,
            micro_batches=forward.micro_batches or 0,
        )

    def _build(self, path: str) -> Executor:
        config, engine, afd = self.config, self.config.engine, self.config.afd
        engine.graphs_on(self._mesh.device)  # refuses what it cannot do
        wire, seconds = wire_to_ffn(afd.wire, self._spec), afd.patience_seconds
        member = Membership(
            self._spec, config.host, config.secret, self._timeout, seconds, wire, self._mesh.clock, afd.home
        )
        number = fixed_number(afd.schedule, afd.micro_batches, self._spec)
        assert self._mesh.shard.size == 1, "no tensor-parallel group of attention ranks yet"
        return attention_executor(
            self._spec, path, member, number, engine.max_sequences, engine.wanted_kernels, self._mesh
        )

    def _serve(self, server: EngineServer) -> None:
        self._forward.member.sign = server.sign
        super()._serve(server)


class FeedForwardRank(Rank):
    """A rank of the FFN pool. Its address is that of the pool's store, where attention ranks join."""

    pools = (FFN,)

    @property
    def ordered(self) -> bool:
        """F adds up as A does."""
        return True

    def _load(self, path: str) -> int:
        config = self.config
        self._store.set_timeout(self._timeout)
        place = place_of(self._spec, config.shard, whole_experts=config.whole_experts, home=config.afd.home)
        side = FeedForwardSide(self._spec, place, self._mesh.all_reduce, self._mesh)
        side.clock = self._mesh.clock
        fill(side, path, self._mesh, config.engine.wanted_kernels)
        wire = wire_to_ffn(config.afd.wire, self._spec)
        self._pool = FeedForwardPool(config, side, self._mesh, self._connect, self._silence, wire)
        return UNBOUNDED

    def _begin(self, kv_tokens: int) -> str | None:
        return self.address

    @property
    def _model(self) -> Transformer:
        return self._pool.side

    def _run(self) -> None:
        if self.config.shard.rank:
            self._pool.follow()
        else:
            self._pool.lead(lambda: self._stopping)

    @property
    def address(self) -> str | None:
        return None if self.config.shard.rank else f"{self.config.host}:{self._store.port}"

    def stats(self) -> PoolFigures:
        pool = self._pool
        native = int(pool.side.native)
        figures = PoolFigures(
            clock=self._mesh.clock.split(),
            steps=pool.steps,
            resumed_steps=pool.resumed,
            busy_seconds=pool.side.busy,
            native_kernels=native,
        )
        figures.take_load(pool.side)
        return figures

    def _connect(self) -> dist.Store:
        """Another connection to the pool's store."""
        store = dist.TCPStore(self._store.host, self._store.port, None, False, timeout=self._timeout)
        return dist.PrefixStore(self.config.prefix, store)

    @property
    def _silence(self) -> timedelta:
        """How long an A rank may keep the pool waiting.

        Longer than the controller takes to kill one that hangs; but F ranks that wait in a reduce, other A ranks, and
        the gateways that wait for those must not lose patience first.
        """
        config = self.config
        return timedelta(seconds=min(config.collective_seconds / 2, config.afd.patience_seconds * 2 / 3))
