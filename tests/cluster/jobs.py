"""A deployment as a user starts one: `ray job submit` against a private Ray cluster, spoken to over HTTP."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import openai
import psutil
import ray
import requests
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

from stepladder.cluster.config import Deployment
from stepladder.cluster.controller import start_controller
from stepladder.cluster.gateway.actor import GatewayActor
from stepladder.cluster.names import namespace
from stepladder.launch.deployed import ready
from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.where import IMPORTED_FROM as ROOT
from stepladder.workers.actors import Place


@dataclass
class Job:
    """A running deployment. `name` is the job's and the deployment's."""

    cluster: PrivateRay
    name: str
    url: str
    run_dir: Path
    pids: list[int]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=90)

    @property
    def generation(self) -> int:
        return self.generation_of("engine-0")

    def generation_of(self, group: str) -> int:
        return json.loads((self.run_dir / "journal.json").read_text())[f"generation of {group}"]

    def rank(self, index: int, group: str = "engine-0", size: int = 2) -> Place:
        """Where one rank of the present generation runs."""
        actors = [self.actor(f"{self.name}/{self.generation_of(group)}/{group}/{i}") for i in range(size)]
        return next(place for place in ray.get([a.where.remote() for a in actors]) if place.rank == index)

    def actor(self, name: str) -> ray.actor.ActorHandle:
        return ray.get_actor(name, namespace=f"stepladder/{self.name}")

    def status(self) -> ray.ObjectRef:
        return ray.get(self.actor("controller").status.remote(), timeout=30)

    def phase(self) -> str:
        """As the controller says, if it is there: while Ray restarts it, it is not."""
        try:
            return self.status().phase
        except RayError:
            return "no controller"

    def detail(self) -> str:
        """What the controller says to a person."""
        return self.status().detail

    def ready(self) -> bool:
        return requests.get(f"{self.url}/ready", timeout=5).status_code == 200

    def stop(self) -> None:
        self.cluster.job("stop", self.name)

    def remains(self) -> list[str]:
        """Whatever of the deployment is still there: processes, named actors, placement groups."""
        processes = [f"process {pid}" for pid in self.pids if psutil.pid_exists(pid)]
        space = f"stepladder/{self.name}"
        actors = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == space]
        groups = [
            g["name"]
            for g in placement_group_table().values()
            if g["name"].startswith(f"{self.name}/") and g["state"] != "REMOVED"
        ]
        return [*processes, *actors, *groups]


def ours(cluster: PrivateRay) -> set[int]:
    """Processes of any deployment: actors, and W&B's helper."""
    titles = ("ray::RankActor", "ray::GatewayActor", "ray::ControllerActor", "wandb-core")
    return {p.pid for title in titles for p in cluster.processes(title)}


@contextmanager
def submit(
    cluster: PrivateRay,
    name: str,
    model: Path | str,
    run_dir: Path,
    *options: str,
    layout: Sequence[str] = ("layout.tp=2",),
) -> Iterator[Job]:
    """Submit, wait until it serves, and stop it in the end if the test has not.

    Args:
        model: a path, which is served as `tiny`, or the name of a choice in conf/model.
    """
    given = ["model=path", f"model.path={model}", "model.name=tiny"] if isinstance(model, Path) else [f"model={model}"]
    command = ["python", "-m", "launch.serve", f"name={name}", *given, *layout]
    command += [f"run_dir={run_dir}", "kv.tokens=8192", *options]
    cluster.job("submit", "--no-wait", "--submission-id", name, "--working-dir", str(ROOT), "--", *command)
    before = ours(cluster)
    url = ready(cluster, name)
    job = Job(cluster, name, url, run_dir, sorted(ours(cluster) - before))
    try:
        yield job
    finally:
        job.stop()
        eventually(lambda: not job.remains(), job.remains)


@contextmanager
def controlled(wanted: Deployment) -> Iterator[tuple[ActorHandle, str]]:
    """The controller of a detached deployment that is ready, and its URL; nothing of it is left at the end."""

    def remains() -> list[str]:
        """Actors; the controller has a namespace of its own, the others that of whoever started it."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        mine = namespace(wanted.name)
        return [a["name"] for a in actors if a["namespace"] == mine or a["name"].startswith(f"{wanted.name}/")]

    controller = start_controller(wanted, GatewayActor)
    try:
        eventually(lambda: ray.get(controller.status.remote()).phase == "ready", seconds=90)
        yield controller, ray.get(controller.status.remote()).url
    finally:
        controller.shut_down.remote()
        eventually(lambda: not remains(), remains, seconds=60)


def eventually(holds: Callable[[], object], otherwise: Callable[[], object] = lambda: "", seconds: float = 40) -> None:
    """Wait until `holds`; fail with what `otherwise` says."""
    deadline = monotonic() + seconds
    while not holds():
        assert monotonic() < deadline, f"not within {seconds} s: {otherwise()}"
        threading.Event().wait(0.1)


def stream_all(
    job: Job, asked: Sequence[dict[str, Any]], tokens: int, strike: Callable[[], None] = lambda: None
) -> list[str]:
    """The texts of all these completions at once, streamed; `strike` happens when the first of them is under way."""

    def stream(index: int) -> str:
        chunks = job.client.completions.create(
            model="tiny", max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}, **asked[index]
        )
        text = ""
        for number, chunk in enumerate(chunks):
            text += chunk.choices[0].text
            if number == 10 and index == 0:
                strike()
        return text

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(stream, range(len(asked))))
