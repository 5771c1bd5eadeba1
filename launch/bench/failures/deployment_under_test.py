"""A deployment that is to be hurt: its processes, its state as the controller tells it, and whatever is left of it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group_table

from stepladder.cluster.names import CONTROLLER, namespace
from stepladder.launch.bench.failures.faults import Fault
from stepladder.launch.deployed import SERVE, ready
from stepladder.launch.private_ray import PrivateRay
from stepladder.workers.actors import Place

POLL_SECONDS = 0.02
Engines = dict[str, dict[str, Any]]  # by engine, its counters
TITLES = {"rank": "ray::RankActor", "gateway": "ray::GatewayActor", "controller": "ray::ControllerActor"}


class State(NamedTuple):
    """phase: the controller's word. serves: whether all engines take requests, and the FFN pool members.
    generations: which life each of them is in. restarts: how often something was put back."""

    phase: str
    serves: bool
    generations: dict[str, int]
    restarts: int


@dataclass
class DeploymentUnderTest:
    """A running deployment; `name` is its own and its job's."""

    cluster: PrivateRay
    name: str
    url: str

    def report(self, timeout: float = 2) -> dict[str, Any]:
        """What the controller tells, within so many seconds."""
        found: dict[str, Any] = ray.get(self.controller.report.remote(), timeout=timeout)
        return found

    def state(self) -> State:
        report = self.report()
        groups = report["engines"] | report.get("pools", {})
        generations = {name: group["generation"] for name, group in groups.items()}
        return State(report["phase"], all(g["serves"] for g in groups.values()), generations, report["restarts"])

    def process(self, failure: Fault) -> psutil.Process:
        """The process that this failure strikes.

        Raises:
            ValueError: there is none, or more than one.
        """
        if failure.kind in ("gateway", "controller"):
            found = self.cluster.processes(TITLES[failure.kind])
        else:
            group, rank = failure.target
            found = [psutil.Process(place.pid) for place in self.places(group) if place.rank == rank]
        if len(found) != 1:
            raise ValueError(f"there are {len(found)} processes to strike where there should be one")
        return found[0]

    def engines(self) -> Engines:
        """The counters of every engine, now; those of its rank 0, which has the engine."""
        groups = [group for group in self.state().generations if group.startswith("engine-")]
        ranks = [(group, actor) for group in groups for actor in self._ranks(group)]
        signs = ray.get([actor.ping.remote() for _, actor in ranks], timeout=10)
        told = [(group, sign.figures.values()) for (group, _), sign in zip(ranks, signs, strict=True) if sign.figures]
        return {group: values for group, values in told if "generation_tokens" in values}

    def census(self) -> dict[str, int]:
        """How many there are of everything that a failure could leave behind."""
        return {kind: len(names) for kind, names in self._all().items()}

    def remains(self) -> list[str]:
        """What is still there of a deployment that was stopped."""
        return [name for names in self._all().values() for name in names]

    def _all(self) -> dict[str, list[str]]:
        """By kind, the names of all that there is."""
        found = {kind: [f"{kind} {p.pid}" for p in self.cluster.processes(of)] for kind, of in TITLES.items()}
        return found | {"actors": self._names(), "placement groups": self._groups()}

    def places(self, group: str) -> list[Place]:
        """Where the ranks of a group are that there are now."""
        places: list[Place] = ray.get([actor.where.remote() for actor in self._ranks(group)], timeout=10)
        return places

    @property
    def controller(self) -> ActorHandle:
        return self._actor(CONTROLLER)

    def _actor(self, name: str) -> ActorHandle:
        return ray.get_actor(name, namespace=namespace(self.name))

    def _ranks(self, group: str) -> list[ActorHandle]:
        prefix = f"{self.name}/{self.report()['generations'][group]}/{group}/"
        return [self._actor(name) for name in self._names() if name.startswith(prefix)]

    def _names(self) -> list[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return [actor["name"] for actor in actors if actor["namespace"] == namespace(self.name)]

    def _groups(self) -> list[str]:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        return [group["name"] for group in groups if group["name"].startswith(f"{self.name}/")]


@contextmanager
def deployed(name: str, run_dir: str, ray_cpus: int, options: list[str]) -> Iterator[DeploymentUnderTest]:
    """A deployment in a private Ray; whoever stops it has the rest of the Ray to look for what it left."""
    with PrivateRay(num_cpus=ray_cpus) as cluster:
        os.environ.update({key: value for key, value in cluster.env.items() if key.startswith("RAY_")})
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(address=cluster.address, namespace="bench", log_to_driver=False)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there: a second signal breaks off the teardown
        try:
            cluster.submit(name, *SERVE, f"name={name}", f"run_dir={run_dir}", *options)
            yield DeploymentUnderTest(cluster, name, ready(cluster, name))
        finally:
            ray.shutdown()


@dataclass
class Watch:
    """Asks the controller over and over, in a thread, until the deployment was seen broken and ready again.

    Args:
        hung: the controller's process, if that is what hangs: it was noticed once that process is gone.

    Attributes:
        noticed: when the controller first said that something was amiss, or did not answer (`monotonic`).
        ready: when it first said after that that all was well.
        last: what it last said; None if it did not answer.
    """

    victim: DeploymentUnderTest
    before: State
    seconds: float
    hung: psutil.Process | None = None
    noticed: float | None = None
    ready: float | None = None
    last: State | None = None
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        deadline = monotonic() + self.seconds
        if (hung := self.hung) and within(self.seconds, lambda: _gone(hung)):
            self.noticed = monotonic()
        while self.ready is None and monotonic() < deadline:
            try:
                state: State | None = self.victim.state()
            except (RayError, GetTimeoutError, ValueError):
                state = None
            self.last = state
            if self.noticed is None and state != self.before:
                self.noticed = monotonic()
            if self.noticed is not None and state is not None and state.phase == "ready" and state.serves:
                self.ready = monotonic()
            threading.Event().wait(POLL_SECONDS)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold in time."""
    deadline = monotonic() + seconds
    while not holds():
        if monotonic() > deadline:
            return False
        threading.Event().wait(POLL_SECONDS)
    return True


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
