"""A gang: the ranks of one group in their placement group. It starts, lives and dies as a whole."""

import logging
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, ClassVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stepladder.cluster import placement
from stepladder.cluster.checkpoint_agreement import CheckpointAgreement
from stepladder.cluster.config import Deployment, Group
from stepladder.cluster.error_text import error_text
from stepladder.cluster.processes import GRACE_SECONDS, kill_process
from stepladder.cluster.ray_wait import wait_for
from stepladder.parallel.shards import Shard
from stepladder.workers.actors import Place, RankActor, Sign
from stepladder.workers.config import AfdConfig
from stepladder.workers.figures import RankFigures
from stepladder.workers.rank import Notice, RankConfig

log = logging.getLogger(__name__)


@dataclass
class Gang:
    """One generation of one engine's ranks, or of the FFN pool's.

    Attributes:
        plan: what the layout says of it. generation: which life of it this is.
        agreement: of the model, as the nodes of this deployment have them.
        ranks: rank actors, rank 0 first. places: where each of them runs.
        asked: when (monotonic seconds) it asked the cluster for room that it has not got yet.
        address: where rank 0 takes requests, or where attention ranks join the pool.
        figures: of every rank, as of its last sign of life.
        loaded: the share of their weights that the ranks have read while they start, of the slowest; else None.
    """

    deployment: Deployment
    plan: Group
    generation: int
    agreement: CheckpointAgreement
    ranks: list[ActorHandle] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    address: str | None = None
    asked: float | None = None
    figures: list[RankFigures] = field(default_factory=list)
    loaded: float | None = None
    _told: dict[type[Notice], Notice] = field(default_factory=dict)

    ROOM_SECONDS: ClassVar[float] = 5.0  # placing ranks takes less where there is room

    @property
    def group(self) -> str:
        """Name of the placement group."""
        return f"{self.deployment.name}/{self.generation}/{self.plan.name}"

    @property
    def waits_for_room(self) -> bool:
        """Whether the cluster is full: longer than placing takes."""
        return self.asked is not None and monotonic() - self.asked > self.ROOM_SECONDS

    @property
    def _gpu(self) -> bool:
        return self.deployment.cluster.device == "cuda"

    def start(self, go: Callable[[], bool]) -> None:
        """Place the ranks, load the model, begin serving.

        Raises:
            ValueError: the model or the configuration cannot work; trying again would not help.
            TimeoutError, RayError: no room, or a process died.
        """
        cluster, size = self.deployment.cluster, self.plan.size
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if self._gpu else {})
        self.asked = monotonic()
        group = placement.place(self.group, bundle, size, cluster.strategy, cluster.start_seconds, go)
        self.asked = None
        actors = [self._actor(group, index) for index in range(size)]
        go = self._pinging(actors, go)  # loading may take longer than a rank waits for its controller
        places = wait_for([a.where.remote() for a in actors], cluster.start_seconds, go)
        order = sorted(range(size), key=lambda i: places[i].node)  # ranks of one node lie side by side
        self.ranks, self.places = [actors[i] for i in order], [places[i] for i in order]
        self._compare_checkpoints(go)
        configs = [self._config(rank) for rank in range(size)]
        (port,) = wait_for([self.ranks[0].open_store.remote(configs[0])], cluster.start_seconds, go)
        loads = [a.load.remote(c, self.places[0].host, port) for a, c in zip(self.ranks, configs, strict=True)]
        kv_tokens = min(wait_for(loads, cluster.start_seconds, go))
        self.address = wait_for([a.begin.remote(kv_tokens) for a in self.ranks], cluster.start_seconds, go)[0]
        wait_for([a.start.remote() for a in self.ranks], cluster.start_seconds, go)
        self.loaded = None

    def adopt(self) -> bool:
        """Take over the ranks that an earlier controller left running; False unless all of them answer."""
        try:
            actors = [ray.get_actor(f"{self.group}/{index}") for index in range(self.plan.size)]
            places = wait_for([a.where.remote() for a in actors], self.deployment.cluster.hang_seconds)
        except (ValueError, RayError, TimeoutError):
            return False
        if any(place.rank is None for place in places):
            return False
        order = sorted(range(len(places)), key=lambda i: places[i].rank)
        self.ranks, self.places = [actors[i] for i in order], [places[i] for i in order]
        self.address = self.places[0].address
        return self.address is not None and self.alive()

    def tell(self, notice: Notice, again: bool = False) -> None:
        """News for all of its ranks, without waiting for them, unless they have been told; or again."""
        if again or self._told.get(type(notice)) != notice:
            self._told[type(notice)] = notice
            for actor in self.ranks:
                actor.tell.remote(notice)

    def alive(self) -> bool:
        """Whether every rank answers and its loop runs; collects their figures."""
        seconds = self.deployment.cluster.hang_seconds
        try:
            signs: list[Sign] = wait_for([a.ping.remote() for a in self.ranks], seconds)
        except RayError as error:
            log.error("%s: a rank died: %s", self.group, error_text(error))
            return False
        except TimeoutError:
            log.error("%s: a rank has not answered for %.0f s", self.group, seconds)
            return False
        self.figures = [sign.figures for sign in signs if sign.figures]
        return all(sign.loop_runs for sign in signs)

    def stop(self) -> None:
        """Let the ranks leave their loops, then remove everything."""
        with suppress(RayError):
            ray.get([a.stop.remote() for a in self.ranks], timeout=2)
        self.kill()

    def kill(self) -> None:
        """End every process and give the resources back, also of ranks that hang (a stopped process ignores Ray)."""
        for actor in self.ranks:
            with suppress(RayError):
                ray.kill(actor)
        for place in self.places:
            kill_process(place, grace_seconds=GRACE_SECONDS)
        placement.remove(self.group)
        self.ranks, self.places, self.asked, self.loaded = [], [], None, None

    def _compare_checkpoints(self, go: Callable[[], bool]) -> None:
        """All nodes must have the same files, those of other gangs too, before any rank reads them."""
        deployment = self.deployment
        asked = deployment.model.path, deployment.engine, deployment.model.cache
        seconds = deployment.cluster.start_seconds
        one_per_node = {place.host: actor for place, actor in zip(self.places, self.ranks, strict=True)}
        found = wait_for([actor.fingerprints.remote(*asked) for actor in one_per_node.values()], seconds, go)
        for host, files in zip(one_per_node, found, strict=True):
            self.agreement.compare(host, files)

    def _actor(self, group: Any, index: int) -> ActorHandle:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return RankActor.options(  # type: ignore[attr-defined]
            name=f"{self.group}/{index}",
            lifetime="detached",
            scheduling_strategy=strategy,
            num_gpus=1 if self._gpu else 0,
            runtime_env=self._runtime_env(),
        ).remote(self.group, self.deployment.cluster.orphan_seconds)

    def _runtime_env(self) -> dict[str, Any]:
        """A rank sees all GPUs of its node. One that serving does not need takes what CPU time is left over, from its
        first import on: in Linux' idle class, so that no thread of those that serve ever waits for it."""
        found: dict[str, Any] = {}
        if self._gpu:
            found["env_vars"] = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if not self.plan.needed:
            found["py_executable"] = f"chrt --idle 0 {shlex.quote(sys.executable)}"
        return found

    def _config(self, rank: int) -> RankConfig:
        place = self.places[rank]
        own = sum(other.node == place.node for other in self.places)
        return RankConfig(
            model=self.deployment.model.path,
            cache=self.deployment.model.cache,
            shard=Shard(rank, len(self.ranks)),
            prefix=self.group,
            host=place.host,
            ranks_here=max(own, self._expected_per_node()),
            own_ranks_here=own,
            device=self.deployment.cluster.device,
            secret=self.deployment.secret,
            collective_seconds=self.deployment.cluster.collective_seconds,
            engine=self.deployment.engine,
            kv=self.deployment.kv,
            speculate=self.deployment.speculate,
            train=self.deployment.train,
            drafters=self.deployment.drafters,
            generation=self.generation,
            balance=self.deployment.layout.balance == "auto",
            whole_experts=self.deployment.layout.whole_experts,
            role=self.plan.role,
            afd=AfdConfig(
                schedule=self.deployment.layout.schedule,
                micro_batches=self.deployment.layout.micro_batches,
                wire=self.deployment.layout.wire,
                home=self.deployment.layout.home,
                patience_seconds=3 * self.deployment.cluster.hang_seconds,
            ),
        )

    def _expected_per_node(self) -> int:
        """Ranks of the deployment that a node gets if they spread evenly: others may be loading beside these."""
        nodes = sum(node["Alive"] for node in ray.nodes())
        return -(-self.deployment.layout.ranks // nodes)

    def _pinging(self, actors: list[ActorHandle], go: Callable[[], bool]) -> Callable[[], bool]:
        """`go`, with a sign of life to the actors each time it is asked, and theirs of how far they have loaded."""
        shares, asked = [0.0] * len(actors), {actor.ping.remote(): index for index, actor in enumerate(actors)}

        def go_on() -> bool:
            for answer in ray.wait(list(asked), num_returns=len(asked), timeout=0)[0]:
                index = asked.pop(answer)
                with suppress(RayError):  # what was asked for besides will fail too
                    shares[index] = ray.get(answer).loaded
                asked[actors[index].ping.remote()] = index
            self.loaded = min(shares)
            return go()

        return go_on
