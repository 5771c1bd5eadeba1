"""suite=failures, as far as no process has to die for it: which process, whose pause, which rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepladder.launch.bench.failures.faults import FAULTS, FailuresBench
from stepladder.launch.bench.failures.retrying_client import RetryingClient
from stepladder.launch.bench.failures.rounds import judge

STRUCK, NOTICED, READY, USUAL = 100.0, 100.3, 105.0, 0.1


def arrivals(*spans: tuple[float, float]) -> list[float]:
    """A chunk every 40 ms from the beginning to the end of each span, relative to the strike."""
    return [STRUCK + float(t) for begin, end in spans for t in np.arange(begin, end, 0.04)]


def occurrence(name: str, streams: list[list[float]]) -> Any:
    """Of a failure that was noticed after 0.3 s."""
    clients = [RetryingClient("", str(n), {}, 0.0, arrivals=times, text="a") for n, times in enumerate(streams)]
    watch: Any = SimpleNamespace(noticed=NOTICED, ready=READY)
    return judge(FAULTS[name], clients, ["a"] * len(clients), STRUCK, watch, USUAL)


def test_streams_of_a_lost_engine_are_told_from_those_that_go_on() -> None:
    """Two are replayed, one of them with a chunk under way at the strike; one of the others stumbles over that."""
    replayed = [arrivals((-1, 0), (0.45, 2)), arrivals((-1, 0.06), (0.62, 2))]
    others = [arrivals((-1, 2)), arrivals((-1, 0.3), (0.45, 2)), arrivals((-2, -1))]
    seen = occurrence("SIGKILL A", [*others, *replayed])
    assert (seen.resumed, seen.last_resumed) == pytest.approx((0.45, 0.62))
    assert seen.detected == pytest.approx(0.3) and seen.ready == pytest.approx(5)


def test_a_stream_that_never_goes_on_is_not_a_recovery() -> None:
    seen = occurrence("SIGKILL rank 0", [arrivals((-1, 0)), arrivals((-1, 0), (4, 5))])
    assert seen.resumed == seen.last_resumed == pytest.approx(4)


@pytest.mark.parametrize("name", ["SIGKILL A", "SIGKILL controller"])
def test_where_nobody_pauses_nobody_resumes(name: str) -> None:
    seen = occurrence(name, [arrivals((-1, 2)), arrivals((-1, 0.02), (0.08, 2))])
    assert seen.resumed is None and seen.last_resumed is None


def test_a_healthy_stream_that_was_slow_before_the_failure_was_noticed_did_not_resume() -> None:
    """A lost one can go on only after that; the slow one's pause is a hair above the usual."""
    slow = arrivals((-1, 0.02), (0.15, 2))
    assert occurrence("SIGKILL A", [slow]).resumed is None
    assert occurrence("SIGKILL A", [slow, arrivals((-1, 0), (0.45, 2))]).resumed == pytest.approx(0.45)


def possible(tmp_path: Path, **options: Any) -> list[str]:
    return FailuresBench(name="failures", run_dir=str(tmp_path), **options).possible


def test_every_kind_of_rank_there_is_can_be_lost(tmp_path: Path) -> None:
    assert possible(tmp_path, kind="afd") == [
        "SIGKILL gateway", "SIGSTOP gateway", "SIGKILL controller", "SIGSTOP controller", "SIGKILL F", "SIGKILL A",
    ]  # fmt: skip
    assert "SIGKILL F 1" in possible(tmp_path, kind="afd", ffn=2)
    assert "SIGKILL A" not in possible(tmp_path, kind="afd", attention=1)
    with pytest.raises(ValueError, match="failures holds 'SIGKILL F 1'"):
        possible(tmp_path, kind="afd", failures=["SIGKILL F 1"])


@pytest.mark.parametrize(
    ("name", "group", "rank"),
    [
        ("SIGKILL rank 1", "engine-0", 1),
        ("SIGKILL F", "ffn", 0),
        ("SIGKILL F 1", "ffn", 1),
        ("SIGKILL A", "engine-1", 0),
    ],
)
def test_the_rank_that_is_struck(name: str, group: str, rank: int) -> None:
    assert FAULTS[name].target == (group, rank)
