"""One rank of a tensor-parallel group, from an empty process to a running loop. No Ray: `actors.py` wraps it."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import Mesh, join
from parallel.shards import Shard
from parallel.spec import ModelSpec
from workers.channel import Channel
from workers.engine import Engine
from workers.executor import Executor
from workers.scheduler import SchedulerConfig
from workers.service import EngineService


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, as a person sets them.

    Attributes:
        max_sequences: how many sequences run at once.
        max_step_tokens: tokens of one step; longer prompts are prefilled in chunks.
        max_model_len: prompt and output together; None takes the model's own limit (or the KV cache's, if smaller).
        max_queued_tokens: tokens that may wait for a place before requests are refused with 429.
        kv_tokens, block_size: the KV cache.
        threads: CPU threads per rank; None shares the machine's cores among the ranks on it.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    max_model_len: int | None = None
    max_queued_tokens: int = 1 << 17
    kv_tokens: int = 16384
    block_size: int = 16
    threads: int | None = None

    def limits(self, spec: ModelSpec) -> SchedulerConfig:
        """The scheduler's view of this for one model.

        Raises:
            ValueError: the limits contradict each other or the model.
        """
        length = self.max_model_len or min(spec.max_position, self.kv_tokens)
        if length > spec.max_position:
            raise ValueError(f"engine.max_model_len is {length}, but the model was made for {spec.max_position} tokens")
        return SchedulerConfig(
            max_sequences=self.max_sequences,
            max_step_tokens=self.max_step_tokens,
            max_model_len=length,
            num_blocks=self.kv_tokens // self.block_size,
            block_size=self.block_size,
            eos_ids=spec.eos_ids,
        )


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What one rank is told.

    Attributes:
        model: directory of the checkpoint; a relative one is looked for below the working directory, then below the
            installed project.
        prefix: names this life of this group in the store; it carries the deployment's generation.
        host: the address of this rank's machine that gateways and other ranks can reach.
        ranks_here: how many ranks share this machine.
        secret: the deployment's; who knows it may talk to the engine.
        collective_seconds: how long a collective may take before the group counts as broken.
    """

    model: str
    shard: Shard
    prefix: str
    host: str
    ranks_here: int
    device: str
    secret: str
    collective_seconds: float
    engine: EngineConfig


class Rank:
    """Steps of a rank's life, in order: `open_store` (rank 0), `load`, `run`."""

    _store: dist.TCPStore
    _executor: Executor
    _mesh: Mesh

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        cores = torch.get_num_threads() if config.engine.threads is None else 0
        torch.set_num_threads(config.engine.threads or max(1, cores // config.ranks_here))
        self._stopping = False
        self._engine: Engine | None = None
        self._channel: Channel | None = None

    def open_store(self) -> int:
        """On rank 0: open the rendezvous on a free port and return it."""
        self._store = dist.TCPStore(self.config.host, 0, None, True, wait_for_workers=False)
        return self._store.port

    def load(self, store_host: str, store_port: int) -> str | None:
        """Join the group and read this rank's weights; on rank 0, return the address where the engine listens.

        Raises:
            ValueError: the checkpoint or the limits are not usable; the sentence says why.
        """
        config, shard = self.config, self.config.shard
        spec = ModelSpec.load(resolve(config.model))
        limits = config.engine.limits(spec)
        if shard.rank:
            self._store = dist.TCPStore(store_host, store_port, None, False, timeout=self._timeout)
        store = dist.PrefixStore(config.prefix, self._store)
        self._mesh = join(store, shard, config.device, config.host, self._timeout)
        self._executor = Executor(spec, resolve(config.model), self._mesh, limits.num_blocks, limits.block_size)
        if shard.rank:
            return None
        self._engine = Engine(limits, self._executor)
        self._channel = Channel(config.host, config.secret)
        return self.address

    def run(self) -> None:
        """Until `stop`, or until the group breaks (then it raises)."""
        if self._engine is None or self._channel is None:
            self._executor.follow()
            return
        EngineService(self._engine, self._channel, self.config.engine.max_queued_tokens).run(lambda: self._stopping)
        self._executor.stop()
        self._channel.close()

    @property
    def address(self) -> str | None:
        """Where rank 0's engine listens, once loaded."""
        return self._channel.address if self._channel else None

    def stop(self) -> None:
        """Ask the loop to end; on rank 0 it sends the others home."""
        self._stopping = True

    def stats(self) -> dict[str, Any]:
        """Counters since start: all-reduce times of this rank, and on rank 0 the engine's."""
        meter = self._mesh.meter
        numbers: dict[str, Any] = {"reduce_seconds": meter.total, "exposed_seconds": meter.exposed}
        return numbers | (asdict(self._engine.stats) if self._engine else {})

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.config.collective_seconds)


def resolve(model: str) -> str:
    """The directory of a checkpoint.

    Raises:
        ValueError: there is none.
    """
    places = [Path(model), Path(__file__).parent.parent / model]
    for place in places:
        if place.is_dir():
            return str(place.resolve())
    raise ValueError(f"model.path {model!r} is not a directory on this machine ({' nor '.join(map(str, places))})")
