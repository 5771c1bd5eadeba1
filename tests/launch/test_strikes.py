"""suite=failures when the deployment does not come back: the rounds end, and the report says so. No process dies."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import GetTimeoutError

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.failures import deployment_under_test as victim
from stepladder.launch.bench.failures import rounds as strikes
from stepladder.launch.bench.failures.deployment_under_test import DeploymentUnderTest, State
from stepladder.launch.bench.failures.faults import FailuresBench, Occurrence
from stepladder.launch.bench.failures.retrying_client import RetryingClient
from stepladder.launch.bench.failures.rounds import Bench, resumed_blocks
from stepladder.launch.bench.failures.suite import report
from stepladder.launch.report import publish
from stepladder.workers.actors import Sign
from stepladder.workers.engine import EngineStats
from stepladder.workers.engine_rank import EngineFigures
from tests.composed import composed

COUNTERS = {"engine-0": {"generation_tokens": 0, "running": 0, "waiting": 0}}
KILL, STOP = "SIGKILL rank 1", "SIGSTOP rank 1"


def options(tmp_path: Path, **others: Any) -> FailuresBench:
    return FailuresBench(name="failures", run_dir=str(tmp_path), **others)


class Hurt:
    """Stands in for a deployment: every strike is mended, until the one after `lives`."""

    url, name, state_error = "", "failures", GetTimeoutError("Get timed out")

    def __init__(self, lives: int) -> None:
        self.lives, self.struck = lives, 0
        self.cluster = SimpleNamespace(job=self._job)

    def state(self) -> State:
        if self.struck > self.lives:
            raise self.state_error
        return State("ready", True, {"engine-0": self.struck}, self.struck)

    def process(self, _: object) -> Any:
        return SimpleNamespace(send_signal=self._strike)

    def engines(self) -> dict[str, Any]:
        return COUNTERS

    def census(self) -> dict[str, int]:
        return {}

    def _strike(self, _: object) -> None:
        self.struck += 1

    def _job(self, *_: str) -> None:
        raise RuntimeError("ray job stop failed:\nits output")


def bench(monkeypatch: pytest.MonkeyPatch, config: FailuresBench, hurt: Hurt) -> Bench:
    def under_way(_: Bench, __: str, ___: int, hit: Callable[[], None]) -> list[RetryingClient]:
        hit()
        return [RetryingClient("", "0", {}, 0.0, text="a", failure="lost" if hurt.struck > hurt.lives else "")]

    answer = SimpleNamespace(json=lambda: {"data": [{"id": "demo"}]})
    monkeypatch.setattr(strikes, "requests", SimpleNamespace(get=lambda *_, **__: answer))
    monkeypatch.setattr(Bench, "_under_way", under_way)
    made: Any = Bench(config, hurt)  # type: ignore[arg-type]
    made._texts = ["a"]
    return made


def test_the_rounds_end_where_it_does_not_come_back_and_keep_what_was_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = options(tmp_path, failures=[KILL, STOP, "SIGKILL rank 0"], repeats=2, recover_seconds=1.0)
    seen, ended = bench(monkeypatch, config, Hurt(lives=1)).rounds()
    assert [len(times) for times in seen.values()] == [1, 1, 0]
    assert (seen[KILL][0].lost, seen[STOP][0].lost) == (0, 1) and seen[STOP][0].ready is None
    assert ended == "SIGSTOP rank 1, time 1: not ready again after 1 s (the controller does not answer)"


@pytest.mark.parametrize(
    ("error", "words"),
    [(GetTimeoutError("Get timed out"), "Get timed out"), (psutil.NoSuchProcess(7), "NoSuchProcess")],
)
def test_a_deployment_that_stops_answering_ends_the_rounds_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, words: str
) -> None:
    hurt = Hurt(lives=9)

    def process(_: object) -> Any:
        if hurt.struck:
            raise error
        return SimpleNamespace(send_signal=hurt._strike)

    monkeypatch.setattr(hurt, "process", process)
    seen, ended = bench(monkeypatch, options(tmp_path, failures=[KILL]), hurt).rounds()
    assert len(seen[KILL]) == 1 and ended and ended.startswith("SIGKILL rank 1, time 2: ") and words in ended


def test_all_rounds_are_run_where_it_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, ended = bench(monkeypatch, options(tmp_path, failures=[KILL], repeats=3), Hurt(lives=9)).rounds()
    assert ended is None and [one.ready is not None for one in seen[KILL]] == [True] * 3


@pytest.mark.parametrize("other", ["a", "b"])
def test_texts_that_are_not_the_same_twice_are_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str
) -> None:
    """Otherwise what a failure changes could not be told."""
    made = bench(monkeypatch, options(tmp_path), Hurt(lives=9))
    texts = iter(("a", other))
    streamed = lambda *_: [RetryingClient("", "0", {}, 0.0, text=next(texts), arrivals=[0.0, 0.1])]  # noqa: E731
    monkeypatch.setattr(Bench, "_under_way", streamed)
    made.prepare()
    goal = report(options(tmp_path), made.pause, {}, None, [], made.unlike).summary["undisturbed: changed texts"]
    assert (goal.value, goal.holds) == (int(other != "a"), other == "a")


def test_a_job_that_cannot_be_stopped_is_something_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = bench(monkeypatch, options(tmp_path), Hurt(lives=0)).stop()
    assert left == ["unknown: RuntimeError: ray job stop failed:"]


def occurred(ready: float | None) -> Occurrence:
    return Occurrence(0, 0, 0.3, ready, None, None, None, 0.1)


def test_the_report_says_that_it_did_not_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = options(tmp_path, failures=[KILL, STOP])
    made = report(
        config, 0.1, {KILL: [occurred(2.0), occurred(None)], STOP: []}, f"{KILL}, time 2: not ready again", []
    )
    goal = made.summary["came back every time"]
    assert goal == (1, "all of 2; SIGKILL rank 1, time 2: not ready again", False)
    assert [row.metric for row in made.rows if row.case == STOP] == ["times struck"], "nothing is claimed of it"
    publish(made, ["suite=failures"], tmp_path)
    assert "NO" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("came back"))
    whole = report(config, 0.1, {KILL: [occurred(2.0)], STOP: [occurred(3.0)]}, None, [])
    assert whole.summary["came back every time"] == (2, "all of 2", True)


def test_a_block_is_that_of_an_engine_whose_step_went_on_this_time() -> None:
    def engine(resumes: int, block: int) -> dict[str, int]:
        return {"pool_resumes": resumes, "pool_resumed_block": block}

    before = {"engine-0": engine(1, 11), "engine-1": engine(0, -1), "engine-2": engine(2, 5)}
    after = {"engine-0": engine(1, 11), "engine-1": engine(1, 3), "engine-2": engine(3, 1)}
    assert resumed_blocks(before, after) == [1, 3]


def test_counters_are_told_engine_by_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every rank that answers, the one that has the engine counts; F ranks have none."""
    first, second = (EngineFigures(engine=EngineStats(generation_tokens=tokens)) for tokens in (5, 7))
    answers = {
        "engine-0": [Sign(True, EngineFigures(reduce_seconds=0.1)), Sign(True, first)],
        "engine-1": [Sign(True, second), Sign(False, None)],
    }

    class Told(DeploymentUnderTest):
        def state(self) -> State:
            return State("ready", True, {"engine-0": 1, "engine-1": 1, "ffn": 1}, 0)

        def _ranks(self, group: str) -> list[Any]:
            return [SimpleNamespace(ping=SimpleNamespace(remote=lambda a=a: a)) for a in answers[group]]

    monkeypatch.setattr(victim, "ray", SimpleNamespace(get=lambda refs, timeout: refs))
    told: Any = Told(None, "failures", "")  # type: ignore[arg-type]
    assert told.engines() == {"engine-0": first.values(), "engine-1": second.values()}
    assert [engine["generation_tokens"] for engine in told.engines().values()] == [5, 7]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"failures": []}, "failures is empty, so nothing would be struck; name some, or give null for all"),
        ({"minutes": -1.0}, "minutes is -1; it must be more than 0, or nothing would be struck"),
        ({"minutes": 0.0}, "minutes is 0; it must be more than 0, or nothing would be struck"),
        ({"ffn": 4}, "ffn is 4, but kind=tp has no such ranks; omit it or use kind=afd"),
        ({"attention": 7}, "attention is 7, but kind=tp has no such ranks; omit it or use kind=afd"),
        ({"kind": "afd", "tp": 3}, "tp is 3, but kind=afd has no such ranks; omit it or use kind=tp"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path: Path, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        options(tmp_path, **given)
    assert str(error.value) == sentence


def test_the_options_defaults_are_those_of_the_file(tmp_path: Path) -> None:
    """What differs from them is what somebody gave."""
    config, _ = suite_of(composed("bench", "suite=failures", f"run_dir={tmp_path}"))
    assert config == options(tmp_path)
