"""Ranks of a disaggregated model: those with attention, which have engines, and those with FFNs, which have none."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from stepladder.parallel.afd.sides import FeedForwardSide
from stepladder.parallel.afd.wire import wire_to_ffn
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.pack import pack_weights
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.membership import Membership, PoolAddress
from stepladder.workers.afd.micro_batches import fixed_number
from stepladder.workers.afd.pool import FeedForwardPool
from stepladder.workers.afd.pool_forward import AttentionExecutor
from stepladder.workers.rank import ATTENTION, FFN, Rank, RankConfig, resolve
from stepladder.workers.server.engine_server import EngineServer

UNBOUNDED = 1 << 40  # tokens of KV cache that an FFN rank has room for: it needs none


class AttentionRank(Rank):
    """A rank that holds attention, KV cache, embedding and head, with an engine of its own."""

    _executor: AttentionExecutor  # type: ignore[assignment]

    def meet(self, pool: PoolAddress | None) -> None:
        """The FFN pool that there is now, from any thread."""
        self._executor.member.meet(pool)

    def stats(self) -> dict[str, Any]:
        member = self._executor.member
        return super().stats() | {
            "pool_wait_seconds": self._executor.waited,
            "pool_resumes": member.resumes,
            "pool_resumed_block": member.resumed_block,
            "micro_batches": self._executor.micro_batches or 0,
        }

    def _build(self, path: str) -> AttentionExecutor:  # type: ignore[override]
        config, afd = self.config, self.config.afd
        config.engine.graphs_on(self._mesh.device)  # refuses what it cannot do
        wire = wire_to_ffn(afd.wire, self._spec)
        member = Membership(self._spec, config.host, config.secret, self._timeout, afd.patience_seconds, wire)
        number = fixed_number(afd.schedule, afd.micro_batches, self._spec)
        limit = config.engine.max_sequences
        return AttentionExecutor(self._spec, path, member, number, limit, config.engine.batch_invariant)

    def _serve(self, service: EngineServer) -> None:
        self._executor.member.sign = service.sign
        super()._serve(service)


class FeedForwardRank(Rank):
    """A rank of the FFN pool. Its address is that of the pool's store, where attention ranks join."""

    def load(self, store_host: str, store_port: int) -> int:
        config = self.config
        path = resolve(config.model)
        self._spec = config.engine.of(ModelSpec.load(path))
        self._join(store_host, store_port)
        self._store.set_timeout(self._timeout)
        side = FeedForwardSide(self._spec, config.shard, self._mesh.all_reduce).requires_grad_(False)
        load_weights(side, path)
        pack_weights(side, config.engine.batch_invariant)
        self._pool = FeedForwardPool(
            side,
            self._mesh,
            self._connect,
            config.prefix,
            config.generation,
            config.host,
            config.secret,
            self._silence,
            wire_to_ffn(config.afd.wire, self._spec),
        )
        return UNBOUNDED

    def begin(self, kv_tokens: int) -> str | None:
        return self.address

    def run(self) -> None:
        if self.config.shard.rank:
            self._pool.follow()
        else:
            self._pool.lead(lambda: self._stopping)

    @property
    def address(self) -> str | None:
        return None if self.config.shard.rank else f"{self.config.host}:{self._store.port}"

    def stats(self) -> dict[str, Any]:
        pool = self._pool
        return {"steps": pool.steps, "resumed_steps": pool.resumed, "busy_seconds": pool.side.busy}

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


ROLES: dict[str, type[Rank]] = {ATTENTION: AttentionRank, FFN: FeedForwardRank}


def rank_of(config: RankConfig) -> Rank:
    """The rank of this role, not loaded yet."""
    return ROLES.get(config.role, Rank)(config)
