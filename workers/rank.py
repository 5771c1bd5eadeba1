"""A rank: one process of a group, from empty to a running loop. No Ray: `actors.py` wraps it.

What kinds of ranks there are stands in `roles.py`.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist

from stepladder.kernels.once import CACHE
from stepladder.parallel.mesh import Mesh, join
from stepladder.parallel.model import Transformer
from stepladder.parallel.rendezvous import open_store
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.config import AfdConfig, EngineConfig, KvConfig
from stepladder.workers.figures import RankFigures
from stepladder.workers.introduction import of_model
from stepladder.workers.model_check import check_memory
from stepladder.workers.sizing import fitting
from stepladder.workers.source.resolve import resolve
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.learning.config import LearnConfig
from stepladder.workers.speculation.learning.lease import LeaseNotice

log = logging.getLogger(__name__)

UNBOUNDED = 1 << 40  # tokens of KV cache that a rank has room for which needs none
WHOLE, ATTENTION, FFN, TRAINER = "whole", "attention", "ffn", "trainer"


class PoolAddress(NamedTuple):
    """A life of the FFN pool. address: host:port of its store; prefix: of its names there; size: how many ranks."""

    generation: int
    address: str
    prefix: str
    size: int


class PoolNotice(NamedTuple):
    """What attention ranks are told: the FFN pool that there is now; None while there is none."""

    pool: PoolAddress | None


class DrafterNotice(NamedTuple):
    """Engines are told: the version of the drafter to use, and where it lies; 0, what they began with."""

    version: int
    directory: str | None


class TeachNotice(NamedTuple):
    """A trainer is told.

    Attributes:
        live: the version that engines shall have; 0: what they began with. None: it has not been told yet.
        keep: versions that stay on the disk.
        doors: where engines give away what they captured. words: names of their words in shared memory.
    """

    live: int | None = None
    keep: tuple[int, ...] = ()
    doors: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


Notice = PoolNotice | DrafterNotice | TeachNotice | LeaseNotice
"""What a running rank can be told; one type per kind of news."""


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What one rank is told.

    Attributes:
        model, cache: what `resolve` makes a directory of.
        prefix: names this life of this group in the store; it carries `generation`, which life it is.
        host: the address of this rank's machine that gateways and other ranks can reach.
        ranks_here: how many ranks of the deployment share this machine.
        own_ranks_here: how many of its own group do.
        secret: the deployment's; who knows it may talk to the engine.
        collective_seconds: how long a collective may take before the group counts as broken.
        balance: FFNs make up for what attention splits unevenly. whole_experts: ranks hold whole experts.
        role: what the group is for; a key of `ROLES`.
        drafters: the folder of a drafter's versions, for engines and trainers alike.
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
    balance: bool = False
    whole_experts: bool = False
    role: str = WHOLE
    own_ranks_here: int = 1
    afd: AfdConfig = field(default_factory=AfdConfig)
    cache: str = CACHE
    speculate: SpeculateConfig = field(default_factory=SpeculateConfig)
    train: LearnConfig = field(default_factory=LearnConfig)
    drafters: str = ""

    @property
    def directory(self) -> str:
        """The model's, on this machine.

        Raises:
            ValueError: there is none, or it is unusable.
        """
        return resolve(self.model, self.engine.dtype, self.cache)


class Rank(ABC):
    """Steps of a rank's life, in order: `open_store` (rank 0), `load`, `begin`, `run`.

    Attributes:
        takes_requests: whether its group has an engine, so that gateways are told its address.
        pools: whose modules it holds of the model.
    """

    takes_requests: ClassVar[bool] = False
    pools: ClassVar[tuple[str, ...]] = ()
    _store: dist.TCPStore
    _names: dist.Store
    _mesh: Mesh
    _spec: ModelSpec
    _load_seconds = 0.0

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        # not torch's own default: Ray sets OMP_NUM_THREADS to the CPUs an actor reserves, which is 1
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.engine.threads or max(1, cores // config.ranks_here))
        self._stopping = False

    @property
    def ordered(self) -> bool:
        """Whether reduces of its group add up in the ranks' order."""
        return self.config.engine.batch_invariant

    @property
    def address(self) -> str | None:
        """Where rank 0 of this group is to be reached, once it has begun; None on the others."""
        return None

    def open_store(self) -> int:
        """On rank 0: open the rendezvous on a free port of this rank's address and return it."""
        self._store = open_store(self.config.host)
        return self._store.port

    def load(self, store_host: str, store_port: int) -> int:
        """Join the group and read this rank's weights; returns how many tokens of KV cache this rank can hold.

        Raises:
            ValueError: the checkpoint or the limits are not usable; the sentence says why.
        """
        path = self.config.directory
        self._spec = self.config.engine.of(ModelSpec.load(path))
        if self.pools:
            config = self.config
            check_memory(self._spec, config.device, config.shard, self.pools, config.own_ranks_here)
        self._join(store_host, store_port)
        self._take_device()
        began = monotonic()
        with fitting("the model"):
            room = self._load(path)
        self._load_seconds = monotonic() - began
        return room

    @abstractmethod
    def _load(self, path: str) -> int:
        """Read the weights; see `load`."""

    def begin(self, kv_tokens: int) -> str | None:
        """The last step before the loop, with what all ranks of the group have agreed on; returns `address`.

        Raises:
            ValueError: the limits contradict each other, the model or the memory that there is.
        """
        with fitting(f"a KV cache of {kv_tokens} tokens"):
            address = self._begin(kv_tokens)
        for line in self._introduction(kv_tokens):
            log.info("%s", line)
        return address

    @abstractmethod
    def _begin(self, kv_tokens: int) -> str | None:
        """See `begin`."""

    def _introduction(self, kv_tokens: int) -> Iterator[str]:
        """What it says of itself once it is ready."""
        if model := self._model:
            yield of_model(model, self.pools, str(self._mesh.device), self._load_seconds)

    @property
    def _model(self) -> Transformer | None:
        """What it holds of the model that is served."""
        return None

    def run(self) -> None:
        """Until `stop`, or until the group breaks (then it raises)."""
        self._take_device()
        self._mesh.clock.restart()
        self._run()

    @abstractmethod
    def _run(self) -> None:
        """See `run`."""

    def tell(self, notice: Notice) -> None:
        """News from outside, from any thread; the loop heeds it when it can."""
        raise AssertionError(f"ranks of role {self.config.role} do not listen to {notice}")

    @property
    def loaded(self) -> float:
        """The share of its weights that it has read, from any thread."""
        mesh = getattr(self, "_mesh", None)  # until it has joined its group
        return mesh.loaded if mesh else 0.0

    def stop(self) -> None:
        """Ask the loop to end; on rank 0 it sends the others home."""
        self._stopping = True

    @abstractmethod
    def stats(self) -> RankFigures:
        """How this rank is, from any thread."""

    def _join(self, store_host: str, store_port: int) -> None:
        """This rank's group; its names in the store have the group's prefix."""
        config = self.config
        if config.shard.rank:
            self._store = dist.TCPStore(store_host, store_port, None, False, timeout=self._timeout)
        self._names = dist.PrefixStore(config.prefix, self._store)
        self._mesh = join(self._names, config.shard, config.device, config.host, self._timeout, self.ordered)

    def _take_device(self) -> None:
        """Make this rank's GPU the current one, which is a property of a thread: `run` has another than `load`."""
        if self._mesh.device.type == "cuda":
            torch.cuda.set_device(self._mesh.device)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.config.collective_seconds)
