"""A group that serving does not need may be absent, die and come back; the deployment is ready all the while."""

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import openai
import psutil
import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from stepladder.cluster.config import (
    ClusterConfig,
    Deployment,
    Group,
    LayoutConfig,
    ModelConfig,
    MonitorConfig,
)
from stepladder.cluster.monitor import JsonlMonitor
from stepladder.cluster.supervisor import Supervisor
from stepladder.launch import ctl
from stepladder.launch.private_ray import PrivateRay
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.rank import FFN
from tests.cluster import test_supervisor as scripted
from tests.cluster.jobs import controlled, eventually
from tests.cluster.test_supervisor import ROOM, ScriptedGang, Turns

SPARE = Group("spare", FFN, 1, needed=False)


class WithSpare(LayoutConfig):
    """One engine, and an FFN pool that no attention rank joins."""

    def groups(self) -> list[Group]:
        return [*super().groups(), SPARE]


def deployment(run_dir: Path, **fields: object) -> Deployment:
    return replace(scripted.deployment(run_dir), layout=WithSpare(replicas=2), **fields)  # type: ignore[arg-type]


scripted_parts = scripted.scripted  # no processes, where a test asks for it


@pytest.fixture
def turns(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Turns]:
    request.getfixturevalue("scripted_parts")
    turns = Turns(Supervisor(deployment(tmp_path), JsonlMonitor(tmp_path / "metrics.jsonl")))
    yield turns
    for keeper in turns.supervisor._keepers:
        keeper.end()


@pytest.mark.parametrize("error", [ROOM, ValueError("no such role")], ids=["room", "hopeless"])
def test_one_that_never_starts_is_not_missed_and_not_given_up(turns: Turns, error: Exception) -> None:
    ScriptedGang.failures["spare"] = [error] * 1000
    turns.until("ready")
    eventually(lambda: len(ScriptedGang.failures["spare"]) < 990)
    turns.until("ready")
    report = turns.supervisor.report()["pools"]["spare"]
    assert (report["needed"], report["serves"]) == (False, False)
    ScriptedGang.failures.clear()
    eventually(lambda: turns.keeper(2).endpoint)
    turns.until("ready")


def test_one_that_is_lost_comes_back_while_the_phase_stays_ready(turns: Turns) -> None:
    turns.until("ready")
    turns.lose(2)
    for _ in range(50):
        turns.supervisor._turn()
        assert turns.supervisor.status().phase == "ready"
    eventually(lambda: turns.keeper(2).gang.generation == 2)


class Watch:
    """Asks the controller for the phase again and again, in a thread."""

    def __init__(self, controller: ray.actor.ActorHandle) -> None:
        self._controller, self._over = controller, threading.Event()
        self.phases: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(0.2):
            self.phases.add(ray.get(self._controller.status.remote(), timeout=30).phase)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)


def deployed(model: Path, run_dir: Path) -> AbstractContextManager[tuple[ActorHandle, str]]:
    """The controller of a detached deployment with a spare group, and its URL."""
    wanted = Deployment(
        name="spare",
        run_dir=str(run_dir),
        secret=secrets.token_hex(32),
        model=ModelConfig(path=str(model), name="tiny"),
        layout=WithSpare(),
        engine=EngineConfig(threads=1),
        kv=KvConfig(tokens=8192),
        cluster=ClusterConfig(hang_seconds=5),
        monitor=MonitorConfig(wandb="disabled"),
        detach=True,
    )
    return controlled(wanted)


ROUNDS = 2  # requests of a stream, one after the other, so that it is under way until the group is back


def streamed(url: str, count: int, begun: Callable[[], None]) -> tuple[list[str], float]:
    """`count` streams at once: their texts, and the longest pause between two chunks of one of them. `begun` is called
    when all of them are under way."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=90)
    under_way = threading.Barrier(count, begun)

    def request(index: int, turn: int) -> tuple[str, float]:
        text, pause, last = "", 0.0, None
        for number, chunk in enumerate(client.completions.create(
            model="tiny", prompt=f"stream {index}: ", max_tokens=900, temperature=0.8, seed=index, stream=True,
            extra_body={"ignore_eos": True},
        )):  # fmt: skip
            if number == 10 and turn == 0:
                under_way.wait(30)
                last = None
            text, now = text + chunk.choices[0].text, monotonic()
            pause, last = max(pause, now - last if last else 0.0), now
        return text, pause

    def stream(index: int) -> list[tuple[str, float]]:
        return [request(index, turn) for turn in range(ROUNDS)]

    with ThreadPoolExecutor(count) as pool:
        found = [one for stream in pool.map(stream, range(count)) for one in stream]
    return [text for text, _ in found], max(pause for _, pause in found)


def start_a_stranger() -> None:
    """A process that has nothing to do with the deployment imports what a rank does: on a small machine, that alone
    makes streams pause."""
    subprocess.Popen([sys.executable, "-c", "import ray, stepladder.workers.actors"])


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_killed_under_load(
    cluster: PrivateRay, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The phase stays ready at every look, the streams are the same, and it comes back under a new generation."""
    with deployed(model, tmp_path) as (controller, url):
        eventually(lambda: ray.get(controller.report.remote())["pools"]["spare"]["serves"], seconds=60)
        rank = ray.get_actor("spare/1/spare/0")  # in the namespace of whoever started the controller
        place = ray.get(rank.where.remote())
        assert os.sched_getscheduler(place.pid) == os.SCHED_IDLE, "it runs on the CPU time that is left over"
        with Watch(controller) as watch:
            calm, spread = streamed(url, 3, lambda: None)
            again, beside = streamed(url, 3, start_a_stranger)
            texts, pause = streamed(url, 3, lambda: os.kill(place.pid, signal.SIGKILL))
            eventually(lambda: not psutil.pid_exists(place.pid))
            eventually(lambda: _generation(controller) == 2, seconds=60)
            assert ctl.main(["status", "name=spare"]) == ctl.OK
        assert watch.phases == {"ready"}
        assert calm == again == texts and all(len(text) > 100 for text in texts)
        with capsys.disabled():
            print(f"longest pause {pause:.3f} s; {beside:.3f} s while a stranger starts, {spread:.3f} s undisturbed")
        engine = ray.get(controller.report.remote())["engines"]["engine-0"]
        assert (engine["generation"], engine["restarts"]) == (1, 0), "nothing was started again for these streams"
    said = capsys.readouterr().out
    assert "waiting for peers" in said and "engine-0/0" in said and "spare/0" in said, "every rank's clock is shown"


def _generation(controller: ray.actor.ActorHandle) -> int:
    """Of the spare group, once it is back; 0 while it is not."""
    try:
        report = ray.get(controller.report.remote(), timeout=10)["pools"]["spare"]
    except RayError:
        return 0
    return report["generation"] if report["serves"] else 0
