"""The driver's loop, without a cluster; tests/cluster/test_deployment.py has the rest."""

import threading
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from stepladder.cluster.config import Deployment, ModelConfig
from stepladder.cluster.supervisor import Status
from stepladder.launch import serve

DEPLOYMENT = Deployment(name="t", run_dir="/nowhere", secret="a", model=ModelConfig(path="/nowhere", name="m"))


class Controller:
    """Answers `left` heartbeats, then is gone; notes when it was asked."""

    def __init__(self, left: int, end: RayActorError) -> None:
        self.left, self.end = left, end
        self.heard: list[float] = []
        self.told = 0
        self.heartbeat = SimpleNamespace(remote=self._heartbeat)
        self.shut_down = SimpleNamespace(remote=self._shut_down)

    def _heartbeat(self) -> Status:
        self.heard.append(monotonic())
        if len(self.heard) > self.left:
            raise self.end
        return Status("draining", "finishing what is in flight", None, {}, 0)

    def _shut_down(self) -> None:
        self.told += 1


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any, timeout: float) -> Any:
        return answer

    monkeypatch.setattr(serve.ray, "get", get)


def test_heartbeats_stay_apart_while_the_deployment_drains() -> None:
    controller, stop = Controller(3, ActorDiedError()), threading.Event()
    stop.set()
    assert serve._watch(controller, DEPLOYMENT, stop) == 0  # type: ignore[arg-type]
    pauses = [b - a for a, b in zip(controller.heard[:-1], controller.heard[1:], strict=True)]
    assert controller.told == 1 and len(pauses) == 3 and min(pauses) > 0.9 * serve.ENDING_SECONDS


def test_a_controller_that_does_not_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    controller, stop = Controller(0, RayActorError(error_msg="run_dir cannot be written")), threading.Event()
    assert serve._watch(controller, DEPLOYMENT, stop) == 1  # type: ignore[arg-type]
    assert capsys.readouterr().out == "stepladder failed: run_dir cannot be written\n"


def test_what_is_done_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """And what was said before is not said again when the deployment itself changes."""
    states = [
        Status("ready", "2 engines", "http://h", {}, 0),
        Status("ready", "2 engines", "http://h", {}, 0, "5.0 tokens/s in"),
        Status("mending", "1 of 2 engines", "http://h", {}, 0, "5.0 tokens/s in"),
        Status("mending", "1 of 2 engines", "http://h", {}, 0, "9.0 tokens/s in"),
    ]
    for before, status in zip([None, *states], states, strict=False):
        serve._tell(status, before)
    assert capsys.readouterr().out.splitlines() == [
        "stepladder ready: 2 engines",
        "STEPLADDER_READY http://h",
        "stepladder: 5.0 tokens/s in",
        "stepladder mending: 1 of 2 engines",
        "stepladder: 9.0 tokens/s in",
    ]
