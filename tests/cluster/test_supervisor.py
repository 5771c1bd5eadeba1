"""What the controller decides when starts fail, without processes; test_deployment.py has the real ones."""

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from stepladder.cluster.config import ClusterConfig, Deployment, LayoutConfig, ModelConfig, MonitorConfig
from stepladder.cluster.gang import Gang
from stepladder.cluster.keeper import Keeper
from stepladder.cluster.monitor import JsonlMonitor
from stepladder.cluster.start_retry import MAX_PAUSE, StartRetry
from stepladder.cluster.supervisor import Supervisor, figures
from stepladder.parallel.clock import Split
from stepladder.workers.afd.ranks import AttentionFigures, PoolFigures
from stepladder.workers.engine import EngineStats
from tests.cluster.serving import eventually
from tests.cluster.test_sentence import remote

ROOM = TimeoutError("the cluster had no room for 1 x {'CPU': 1.0} within 1 s")
TAKEN = "gateway.host 127.0.0.1 port 8000: Address already in use"


class ScriptedGang(Gang):
    """No processes: starts fail as told, then succeed."""

    failures: ClassVar[dict[str, list[Exception]]] = {}

    def start(self, go: Callable[[], bool]) -> None:
        if failures := self.failures.get(self.plan.name):
            raise failures.pop(0)
        self.ranks, self.address = [object()], "tcp://nowhere"  # type: ignore[list-item]

    def alive(self) -> bool:
        return bool(self.address)

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.ranks, self.address = [], None


class ScriptedHandle:
    """No process: starts fail as told, then succeed."""

    failures: ClassVar[list[Exception]] = []
    lacking: ClassVar[list[str]] = []

    def __init__(self, deployment: Deployment, name: str, life: int, port: int) -> None:
        self.life, self.port, self.actor = life, port, None
        self.stats: dict[str, Any] = {}
        self.url = "http://nowhere"

    def homeless(self) -> str | None:
        return self.lacking[0] if self.lacking else None

    def start(self, go: Callable[[], bool]) -> None:
        self.life, self.actor = self.life + 1, object()  # type: ignore[assignment]
        if self.failures:
            raise self.failures.pop(0)
        self.port, self.stats = self.port or 8000, {"ready": True}

    def alive(self) -> bool:
        return self.actor is not None

    def kill(self) -> None:
        self.actor, self.stats = None, {}

    def show(self, table: object, admit: bool) -> None:
        pass

    def take_figures(self) -> dict[str, Any]:
        return {}


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("stepladder.cluster.keeper.Gang", ScriptedGang)
    monkeypatch.setattr("stepladder.cluster.supervisor.GatewayHandle", ScriptedHandle)
    monkeypatch.setattr("stepladder.cluster.start_retry.MAX_PAUSE", 0.01)
    yield
    ScriptedGang.failures.clear()
    ScriptedHandle.failures.clear()
    ScriptedHandle.lacking.clear()


def deployment(run_dir: Path, secret: str = "a") -> Deployment:
    return Deployment(
        name="t",
        run_dir=str(run_dir),
        secret=secret,
        model=ModelConfig(path="/nowhere", name="m"),
        layout=LayoutConfig(replicas=2),
        cluster=ClusterConfig(ping_seconds=0.01),
        monitor=MonitorConfig(every_seconds=0.0),
        detach=True,
    )


class Turns:
    """A supervisor whose turns a test takes itself."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        for keeper in supervisor._keepers:
            keeper.start()

    def until(self, phase: str, words: str = "") -> None:
        """Turn after turn."""

        def reached() -> bool:
            self.supervisor._turn()
            return self.supervisor.status().phase == phase and words in self.supervisor.status().detail

        eventually(reached)

    def lose(self, engine: int) -> None:
        self.keeper(engine).gang.address = None

    def keeper(self, engine: int) -> Keeper:
        return self.supervisor._keepers[engine]


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[Turns]:
    turns = Turns(Supervisor(deployment(tmp_path), JsonlMonitor(tmp_path / "metrics.jsonl")))
    yield turns
    for keeper in turns.supervisor._keepers:
        keeper.end()


RETRIED = [ROOM, remote(ValueError("/m has no tensor x")), GetTimeoutError("late"), RayActorError(error_msg="it died")]


@pytest.mark.parametrize("error", RETRIED, ids=["room", "checkpoint", "silence", "death"])
def test_an_engine_that_has_worked_is_tried_again_while_the_other_serves(turns: Turns, error: Exception) -> None:
    turns.until("ready")
    ScriptedGang.failures["engine-1"] = [error] * 1500
    turns.lose(1)
    said = str(error) if "\n" not in str(error) else "/m has no tensor x (on node 10.0.0.7)"
    turns.until("mending", f"1 of 2 engines serve; engine-1: {said}; trying again")
    eventually(lambda: len(ScriptedGang.failures["engine-1"]) < 1490)
    assert turns.keeper(0).endpoint and turns.supervisor.status().restarts == 1
    ScriptedGang.failures.clear()
    turns.until("ready")
    assert turns.keeper(1).starts.trouble is None and turns.supervisor.status().restarts == 1


@pytest.mark.parametrize(("errors", "why"), [
    ([ROOM], str(ROOM)),
    ([ValueError("layout.tp is 3")], "layout.tp is 3"),
    ([remote(ValueError("kv.tokens is 3"))], "kv.tokens is 3 (on node 10.0.0.7)"),
    ([remote(TypeError("a list where a number is needed"))], "TypeError: a list where a number is needed"),
    ([remote(KeyError("rope_theta"))], "KeyError: 'rope_theta'"),
    ([RayError("gone")] * 3, "3 starts of engine-1 failed, the last one with: gone"),
    ([GetTimeoutError("late")] * 3, "3 starts of engine-1 failed, the last one with: late"),
    ([TimeoutError(errno.ETIMEDOUT, "of a socket")] * 3, "3 starts of engine-1 failed, the last one with: [Errno"),
])  # fmt: skip
def test_an_engine_that_has_never_worked_fails_the_deployment(turns: Turns, errors: list[Exception], why: str) -> None:
    ScriptedGang.failures["engine-1"] = [*errors, *[RayError("once more")] * 9]
    turns.until("failed", why)
    assert len(ScriptedGang.failures["engine-1"]) == 9


def test_an_engine_that_died_with_the_controller_has_worked(tmp_path: Path, turns: Turns) -> None:
    turns.until("ready")
    after = Supervisor(deployment(tmp_path), JsonlMonitor(tmp_path / "metrics.jsonl"))
    assert after.status().phase == "mending" and all(keeper.starts.worked for keeper in after._keepers)
    assert after._gateway_starts.worked


def test_a_gateway_whose_port_is_taken_for_a_moment_comes_back(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    turns.until("ready")
    monkeypatch.setattr("stepladder.cluster.start_retry.MAX_PAUSE", 60.0)
    ScriptedHandle.failures.append(remote(ValueError(TAKEN)))
    turns.supervisor._gateway.kill()
    turns.until("mending", f"2 of 2 engines serve; the gateway: {TAKEN} (on node 10.0.0.7); trying again")
    life = turns.supervisor._gateway.life
    turns.supervisor._turn()
    assert turns.supervisor._gateway.life == life, "it is not due yet"
    turns.supervisor._gateway_starts._due = 0.0
    turns.until("ready")
    assert turns.supervisor._gateway.port == 8000


@pytest.mark.parametrize(("errors", "why"), [
    ([remote(ValueError(TAKEN))], f"{TAKEN} (on node 10.0.0.7)"),
    ([RayActorError(error_msg="it died")] * 3, "3 starts of the gateway failed, the last one with: it died"),
])  # fmt: skip
def test_a_gateway_that_has_never_worked_fails_the_deployment(turns: Turns, errors: list[Exception], why: str) -> None:
    ScriptedHandle.failures.extend(errors)
    turns.until("failed", why)


def test_loading_is_followed_in_tenths(turns: Turns) -> None:
    """By the slowest group of those that load."""
    turns.until("ready")
    for shares, words in (
        ((0.09, 0.5), ""),
        ((0.31, 0.5), " (30 % of the weights are read)"),
        ((1.0, None), " (100 %"),
    ):
        for index, share in enumerate(shares):
            turns.keeper(index).gang.loaded = share
        assert turns.supervisor._loaded().startswith(words) and bool(turns.supervisor._loaded()) == bool(words)


def test_a_gateway_that_no_node_can_take_is_told_at_once_and_waited_for(turns: Turns) -> None:
    """Engines start meanwhile; a node that comes later takes it."""
    ScriptedHandle.lacking.append("gateway.resource is 'gpu_room', but no node of the cluster has it")
    why = f"the gateway: {ScriptedHandle.lacking[0]} (waiting up to 300 s for one); trying again"
    turns.until("starting", why)
    assert turns.supervisor._gateway.life == 0
    eventually(lambda: all(turns.keeper(index).endpoint for index in range(2)))
    ScriptedHandle.lacking.clear()
    turns.until("ready")
    assert turns.supervisor._gateway.life == 1 and turns.supervisor._gateway_starts.trouble is None


def test_a_gateway_that_no_node_ever_takes_fails_the_deployment(tmp_path: Path) -> None:
    ScriptedHandle.lacking.append("gateway.resource is 'gpu_room', but no node of the cluster has it")
    impatient = replace(deployment(tmp_path), cluster=ClusterConfig(ping_seconds=0.01, start_seconds=0.05))
    turns = Turns(Supervisor(impatient, JsonlMonitor(tmp_path / "metrics.jsonl")))
    turns.until("failed", "no node of the cluster has it; set it to one of these, or to null for any node")


def test_pauses_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepladder.cluster.start_retry.MAX_PAUSE", MAX_PAUSE)
    starts, pauses = StartRetry("engine-0", worked=True), []
    for _ in range(2000):
        starts.failed(ROOM)
        pauses.append(starts.pause)
    assert [round(pause) for pause in (*pauses[:5], pauses[-1])] == [2, 4, 8, 16, 30, 30]
    starts.succeeded()
    starts.failed(ROOM)
    assert round(starts.pause) == 2


def test_a_second_deployment_of_a_folder_has_its_own_port(tmp_path: Path, turns: Turns) -> None:
    turns.until("ready")
    turns.supervisor.drain(True)
    same = Supervisor(deployment(tmp_path), JsonlMonitor(tmp_path / "metrics.jsonl"))
    assert (same._gateway.port, same.report()["draining"]) == (8000, True)
    other = Supervisor(deployment(tmp_path, "b"), JsonlMonitor(tmp_path / "metrics.jsonl"))
    assert (other._gateway.port, other.report()["draining"], other.status().phase) == (0, False, "starting")
    assert other._gateway.life == same._gateway.life > 0, "names of processes are not used twice"


def test_a_controller_that_is_lost_while_it_ends_goes_on_with_it(tmp_path: Path, turns: Turns) -> None:
    turns.supervisor.shut_down()
    assert not Supervisor(deployment(tmp_path), JsonlMonitor(tmp_path / "metrics.jsonl"))._go()


def test_serving_goes_on_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    supervisor = Supervisor(deployment(tmp_path), JsonlMonitor(tmp_path / "metrics.jsonl"))
    (tmp_path / "journal.new").symlink_to("/dev/full")
    turns = Turns(supervisor)
    with caplog.at_level(logging.ERROR):
        turns.until("ready")
        turns.lose(1)
        eventually(lambda: supervisor.status().generations["engine-1"] == 2)
        turns.until("ready")
    for keeper in supervisor._keepers:
        keeper.end()
    assert sum("metrics.jsonl cannot be written" in line for line in caplog.messages) == 1
    assert sum("journal.json cannot be written" in line for line in caplog.messages) == 1


def test_figures_of_the_pool_and_of_each_attention_rank() -> None:
    engine = EngineStats(steps=3, kv_usage=0.5)
    engines = {
        "engine-0": [AttentionFigures(engine=engine, pool_wait_seconds=1.5, micro_batches=2)],
        "engine-1": [AttentionFigures(engine=engine, pool_wait_seconds=0.5, micro_batches=2)],
    }
    pool = PoolFigures(Split(2.0, 1.0, 0.5), steps=7, resumed_steps=1, busy_seconds=0.25)
    found = figures(engines, {"ffn": [pool]}, {"serve/tokens_per_s": 9, "serve/ttft_ms_p50": None})
    clocks = {key: found.pop(key) for key in list(found) if key.startswith("ranks/")}
    assert {key: value for key, value in found.items() if value} == {
        "engine/steps": 6.0,
        "engine/kv_usage": 0.5,
        "engine/pool_wait_seconds": 2.0,
        "afd/engine-0/pool_wait_seconds": 1.5,
        "afd/engine-0/micro_batches": 2.0,
        "afd/engine-1/pool_wait_seconds": 0.5,
        "afd/engine-1/micro_batches": 2.0,
        "afd/ffn/steps": 7.0,
        "afd/ffn/resumed_steps": 1.0,
        "afd/ffn/busy_seconds": 0.25,
        "serve/tokens_per_s": 9.0,
    }
    assert {key for key, value in found.items() if not value} == {
        f"engine/{name}"
        for name in (
            *("reduce_seconds", "exposed_seconds", "pool_resumes", "prompt_tokens", "generation_tokens"),
            *("preemptions", "running", "waiting", "prefix_cache_queries", "prefix_cache_hits", "step_tokens"),
            *("drafts", "draft_tokens", "accepted_tokens", "draft_length", "draft_seconds"),
        )
    } | {f"afd/engine-{index}/drafter_version" for index in range(2)} | {
        f"{part}/expert_{name}"
        for part in ("engine", "afd/ffn")
        for name in ("imbalance", "rank_imbalance", "tokens_dropped")
    }
    assert {key: value for key, value in clocks.items() if "ffn" in key} == {
        "ranks/ffn/0/busy_seconds": 2.0,
        "ranks/ffn/0/waiting_seconds": 1.0,
        "ranks/ffn/0/idle_seconds": 0.5,
    }
    assert len(clocks) == 9


def test_a_deployment_without_training_has_no_drafter(turns: Turns) -> None:
    with pytest.raises(ValueError, match="this deployment does not train a drafter; serve with train=online"):
        turns.supervisor.drafter("list")
    assert "drafter" not in turns.supervisor.report()
