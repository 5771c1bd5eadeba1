"""One rank of a tensor-parallel group, from an empty process to a running loop. No Ray: `actors.py` wraps it."""

import os
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepladder.parallel.mesh import Mesh, join
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.config import AfdConfig, EngineConfig, KvConfig
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.graphs import CudaCapture
from stepladder.workers.server.channel import Channel
from stepladder.workers.server.engine_server import EngineServer
from stepladder.workers.sizing import kv_size

WHOLE, ATTENTION, FFN = "whole", "attention", "ffn"


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What one rank is told.

    Attributes:
        model: directory of the checkpoint; a relative one is looked for below the working directory, then below the
            installed project.
        prefix: names this life of this group in the store; it carries `generation`, which life it is.
        host: the address of this rank's machine that gateways and other ranks can reach.
        ranks_here: how many ranks of the deployment share this machine.
        secret: the deployment's; who knows it may talk to the engine.
        collective_seconds: how long a collective may take before the group counts as broken.
        role: which modules of each layer the group has; "whole", "attention" or "ffn".
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
    kv: KvConfig
    generation: int = 1
    role: str = WHOLE
    afd: AfdConfig = field(default_factory=AfdConfig)


class Rank:
    """Steps of a rank's life, in order: `open_store` (rank 0), `load`, `begin`, `run`.

    This one holds a slice of every layer; `roles.py` has those that hold only attention or only FFNs.
    """

    _store: dist.TCPStore
    _executor: Executor
    _names: dist.Store
    _mesh: Mesh
    _spec: ModelSpec

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        # not torch's own default: Ray sets OMP_NUM_THREADS to the CPUs an actor reserves, which is 1
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.engine.threads or max(1, cores // config.ranks_here))
        self._stopping = False
        self._engine: Engine | None = None
        self._channel: Channel | None = None

    def open_store(self) -> int:
        """On rank 0: open the rendezvous on a free port and return it."""
        self._store = dist.TCPStore(self.config.host, 0, None, True, wait_for_workers=False)
        return self._store.port

    def load(self, store_host: str, store_port: int) -> int:
        """Join the group and read this rank's weights; returns how many tokens of KV cache this rank can hold.

        Raises:
            ValueError: the checkpoint or the limits are not usable; the sentence says why.
        """
        config, engine = self.config, self.config.engine
        path = resolve(config.model)
        self._spec = engine.of(ModelSpec.load(path))
        self._join(store_host, store_port)
        self._take_device()
        self._executor = self._build(path)
        return kv_size(self._executor, engine, config.kv, self._mesh.device, config.ranks_here)

    def begin(self, kv_tokens: int) -> str | None:
        """Allocate the KV cache, of equal size on every rank; rank 0 returns the address where its engine listens.

        Raises:
            ValueError: the limits contradict each other or the model.
        """
        config = self.config
        limits = config.engine.limits(self._spec, config.kv, kv_tokens, self._mesh.device)
        self._executor.allocate(limits.num_blocks, limits.block_size)
        if config.shard.rank:
            return None
        self._engine = Engine(limits, self._executor)
        self._channel = Channel(config.host, config.secret)
        return self.address

    def run(self) -> None:
        """Until `stop`, or until the group breaks (then it raises)."""
        self._take_device()
        if self._engine is None or self._channel is None:
            self._executor.follow()
            return
        self._serve(EngineServer(self._engine, self._channel, self.config.engine.max_queued_tokens))
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

    def _join(self, store_host: str, store_port: int) -> None:
        """This rank's group; its names in the store have the group's prefix."""
        config = self.config
        if config.shard.rank:
            self._store = dist.TCPStore(store_host, store_port, None, False, timeout=self._timeout)
        self._names = dist.PrefixStore(config.prefix, self._store)
        ordered = config.engine.batch_invariant or config.role == FFN  # F sums as A does, in the ranks' order
        self._mesh = join(self._names, config.shard, config.device, config.host, self._timeout, ordered)

    def _build(self, path: str) -> Executor:
        engine, device = self.config.engine, self._mesh.device
        capture = CudaCapture(device) if engine.graphs_on(device) else None
        return Executor(self._spec, path, self._mesh, batch_invariant=engine.batch_invariant, capture=capture)

    def _serve(self, service: EngineServer) -> None:
        service.run(lambda: self._stopping)

    def _take_device(self) -> None:
        """Make this rank's GPU the current one, which is a property of a thread: `run` has another than `load`."""
        if self._mesh.device.type == "cuda":
            torch.cuda.set_device(self._mesh.device)

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
