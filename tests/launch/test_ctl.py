"""What `launch.ctl` does before it speaks to a cluster; tests/cluster/test_deployment.py has the rest."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from heapq import merge
from pathlib import Path
from typing import Any

import pytest

from stepladder.cluster.names import deployments, namespace
from stepladder.launch import ctl
from stepladder.launch.logs import LogOptions, _dated

ROOT = Path(__file__).parents[2]
ENGINE = {"generation": 2, "serves": True, "restarts": 1, "running": 3, "waiting": 0, "kv_usage": 0.25, "steps": 99}
ENGINE["native_kernels"] = 1
REPORT: dict[str, Any] = {
    "name": "a", "model": "m", "phase": "ready", "detail": "serving m at http://h:1", "url": "http://h:1",
    "generations": {"engine-0": 2}, "restarts": 1, "in_flight": 4, "draining": False,
    "engines": {"engine-0": ENGINE, "engine-1": {"generation": 1, "serves": False, "restarts": 0}},
    "figures": {"serve/tokens_per_s": 12.34},
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["status", "nmae=a"], "status: nmae is not an option; the top level takes format, name, seconds"),
        (["status", "format=xml"], "status: format is 'xml'; it must be table or json"),
        (["drain", "seconds=soon"], "drain: seconds is 'soon': expected `float`, got `str`"),
        (["status", "seconds=0"], "status: seconds is 0.0; it must be above 0"),
        (["logs", "lines=0"], "logs: lines is 0; it must be at least 1"),
        (["logs", "follow"], "logs: 'follow' is not of the form option=value"),
        (["stop", "follow=true"], "stop: follow is not an option"),
    ],
)
def test_wrong_usage_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(words) == ctl.USAGE
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_an_unknown_command_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ctl.main(["restart"])
    assert ended.value.code == ctl.USAGE and "status" in capsys.readouterr().err


def test_words_become_options() -> None:
    options = ctl.build(LogOptions, ctl.pairs(["name=007", "follow=true", "lines=5", "actor=a=b"]), strict=False)
    assert options == LogOptions(name="007", follow=True, lines=5, actor="a=b")


def test_no_cluster_is_one_sentence() -> None:
    """It must not start one, nor load torch to say so."""
    code = "import sys; from stepladder.launch import ctl; ctl.main(['status']); sys.exit('torch' in sys.modules)"
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    said = r"stepladder: no Ray cluster at [\d.]+:1 \(RAY_ADDRESS=127.0.0.1:1\): Connection refused; start one .*\n"
    assert done.returncode == 0 and re.fullmatch(said, done.stderr), done.stderr


def test_an_address_for_jobs_is_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert ctl.main(["status"]) == ctl.ABSENT
    assert "needs the head's own address, such as head:6379" in capsys.readouterr().err


def test_a_report_for_a_person() -> None:
    lines = ctl.describe(REPORT).splitlines()
    assert lines[0] == "a  ready: serving m at http://h:1"
    assert lines[2] == "requests  4 in flight, 12.3 tokens/s"
    assert lines[-2].split() == ["engine-0", "2", "yes", "1", "3", "0", "25%", "99", "native", "-"]
    assert lines[-1].split() == ["engine-1", "1", "no", "0", "-", "-", "-", "-", "-", "-"]


def test_a_report_shows_the_pool_too() -> None:
    pool = {"generation": 3, "serves": True, "restarts": 2, "steps": 42, "resumed_steps": 1, "busy_seconds": 1.25}
    pool["native_kernels"] = 0
    lines = ctl.describe(REPORT | {"pools": {"ffn": pool}}).splitlines()
    assert lines[-2].split() == ["pool", "generation", "serves", "restarts", "steps", "resumed", "busy", "s", "kernels"]
    assert lines[-1].split() == ["ffn", "3", "yes", "2", "42", "1", "1.2", "torch"]


def test_a_report_shows_how_evenly_experts_are_used() -> None:
    loads = {"expert_tokens": [3, 1], "expert_imbalance": 1.5, "expert_rank_imbalance": 1.0, "expert_tokens_dropped": 0}
    engine = REPORT["engines"]["engine-0"]
    assert "experts" not in ctl.describe(REPORT)
    lines = ctl.describe(REPORT | {"engines": {"engine-0": engine | loads}}).splitlines()
    said = "engine-0: the busiest expert had 1.50 of the mean, the busiest rank 1.00, 0 tokens dropped"
    assert f"experts   {said}" in lines


def test_a_report_shows_how_each_rank_spends_its_time() -> None:
    ranks = [{"host": f"h{i}", "pid": i, "busy": 3.0 - i, "waiting": 1.0 + i, "idle": 4.0} for i in range(2)]
    engine = REPORT["engines"]["engine-0"] | {"ranks": ranks}
    lines = ctl.describe(REPORT | {"engines": {"engine-0": engine}}).splitlines()
    assert lines[-3].split() == ["rank", "host", "busy", "waiting", "for", "peers", "idle"]
    assert [line.split() for line in lines[-2:]] == [
        ["engine-0/0", "h0", "38%", "12%", "50%"],
        ["engine-0/1", "h1", "25%", "25%", "50%"],
    ]


def test_deployments_are_known_by_their_controllers() -> None:
    actors = [
        {"name": "controller", "namespace": namespace("b")},
        {"name": "controller", "namespace": namespace("a/x")},
        {"name": "b/1/engine-0/0", "namespace": namespace("b")},
        {"name": "controller", "namespace": "somebody/else"},
    ]
    assert deployments(actors) == ["a/x", "b"]


def test_lines_without_a_time_stay_behind_the_one_before() -> None:
    def lines(*texts: str) -> Iterator[tuple[str, str]]:
        return _dated(iter(texts))

    one = lines("2026-01-01 00:00:01,000 first", "  of a traceback", "2026-01-01 00:00:03,000 third")
    two = lines("2026-01-01 00:00:02,000 second")
    assert [line.split()[-1] for _, line in merge(one, two, key=lambda dated: dated[0])] == [
        "first", "traceback", "second", "third",
    ]  # fmt: skip


def test_a_report_shows_the_drafter_where_one_is_taught() -> None:
    drafter = {"live": 7, "previous": 6, "pinned": None, "paused": False, "behind": [], "acceptance": {6: 0.5, 7: 0.61}}
    assert "drafter   version 7 is live, previous 6, acceptance 0.61" in ctl.describe(REPORT | {"drafter": drafter})
    assert "drafter" not in ctl.describe(REPORT)
