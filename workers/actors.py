"""Ray actors around ranks. Ray places and owns the process; it is not in the token path."""

import gc
import logging
import os
import threading
from dataclasses import replace
from typing import NamedTuple

import psutil
import ray

from stepladder.parallel.checkpoint import fingerprints
from stepladder.workers.config import EngineConfig
from stepladder.workers.figures import RankFigures
from stepladder.workers.model_check import check_model
from stepladder.workers.rank import Notice, Rank, RankConfig
from stepladder.workers.roles import rank_of
from stepladder.workers.silence import Silence
from stepladder.workers.source.resolve import resolve

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a process of ours runs. `born` (seconds since the epoch) guards against a reused pid."""

    node: str
    host: str
    pid: int
    born: float
    rank: int | None
    address: str | None

    @staticmethod
    def here(rank: int | None = None, address: str | None = None) -> "Place":
        node, host = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        return Place(node, host, os.getpid(), psutil.Process().create_time(), rank, address)


class Sign(NamedTuple):
    """Of life. figures: once the loop runs. loaded: the share of its weights that the rank has read."""

    loop_runs: bool
    figures: RankFigures | None
    loaded: float = 0.0


@ray.remote(num_cpus=0, concurrency_groups={"ctl": 2})
class RankActor:
    """One rank. The loop runs in a thread of its own; `ctl` answers while it does.

    A rank that has heard no controller for `orphan_seconds` ends itself, and its gang's placement group with it.
    """

    def __init__(self, group: str, orphan_seconds: float) -> None:
        configure_logging()
        self._group, self._orphan_seconds = group, orphan_seconds
        self._tick = orphan_seconds / 10
        self._silence = Silence(self._tick)  # the controller's
        self._rank: Rank | None = None
        self._running = False
        self._loop = threading.Thread(target=self._run, daemon=True, name="rank-loop")
        threading.Thread(target=self._watch, daemon=True, name="orphan-watch").start()

    def where(self) -> Place:
        """This process's place in the cluster, and in its group once it has loaded."""
        return Place.here(*((self._rank.config.shard.rank, self._rank.address) if self._rank else (None, None)))

    def open_store(self, config: RankConfig) -> int:
        """Rank 0: the port of the group's rendezvous."""
        self._rank = rank_of(_on_this_device(config))
        return self._rank.open_store()

    def fingerprints(self, model: str, engine: EngineConfig, cache: str) -> dict[str, str]:
        """A hash of each of the checkpoint's files as this machine has it; ValueError if one is unusable."""
        check_model(path := resolve(model, engine.dtype, cache), engine)
        return fingerprints(path)

    def load(self, config: RankConfig, store_host: str, store_port: int) -> int:
        """Join the group, read the weights; returns how many tokens this rank can cache."""
        self._rank = self._rank or rank_of(_on_this_device(config))
        return self._rank.load(store_host, store_port)

    def begin(self, kv_tokens: int) -> str | None:
        """Allocate the cache; rank 0 returns its engine's address."""
        assert self._rank
        return self._rank.begin(kv_tokens)

    def start(self) -> None:
        """Begin the loop."""
        settle_memory()
        self._running = True
        self._loop.start()

    @ray.method(concurrency_group="ctl")
    def ping(self) -> Sign:
        """A sign of life for both sides: whether the loop runs, and how this rank is."""
        self._silence.broken()
        rank = self._rank
        return Sign(self._running, rank.stats() if rank and self._running else None, rank.loaded if rank else 0.0)

    @ray.method(concurrency_group="ctl")
    def tell(self, notice: Notice) -> None:
        """News for the loop, which goes on meanwhile."""
        assert self._rank
        self._rank.tell(notice)

    @ray.method(concurrency_group="ctl")
    def stop(self) -> None:
        """Ask the loop to end, and wait for it: whoever is killed before the others have left breaks their group."""
        if self._rank and self._running:
            self._rank.stop()
            self._loop.join()

    def _run(self) -> None:
        """A broken group cannot be repaired from inside: end the process, so that everybody notices at once."""
        assert self._rank
        try:
            self._rank.run()
        except BaseException:
            log.exception("the rank's loop broke; ending the process")
            os._exit(1)
        self._running = False

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._tick):
            if self._silence.seconds > self._orphan_seconds:
                log.error("no controller for %.0f s; ending this rank and its group", self._orphan_seconds)
                try:
                    ray.util.remove_placement_group(ray.util.get_placement_group(self._group))
                finally:
                    os._exit(1)


def configure_logging() -> None:
    """Ray leaves the root logger of a worker silent below WARNING."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


def settle_memory() -> None:
    """What there is stays: the garbage collector need not go through it again, which would hold all threads of a
    process that has loaded torch up for a third of a second now and then (as vLLM does)."""
    gc.collect()
    gc.freeze()


def _on_this_device(config: RankConfig) -> RankConfig:
    """All GPUs of the machine stay visible, so that ranks can reach each other's memory; take the one Ray gave us."""
    if config.device != "cuda":
        return config
    return replace(config, device=f"cuda:{ray.get_runtime_context().get_accelerator_ids()['GPU'][0]}")
