"""Figures reach the file whatever becomes of W&B."""

import json
import resource
from pathlib import Path

import pytest

from stepladder.cluster.monitor import JsonlMonitor, Monitors, WandbMonitor, open_monitor

ROWS = [{"train/step": 1, "train/loss": 3.5}, {"train/step": 2, "train/loss": 3.25}]


def read(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("time") > 1e9 for row in rows)
    return rows


def test_rows_are_there_before_the_file_is_closed_and_a_second_run_appends(tmp_path: Path) -> None:
    first = JsonlMonitor(tmp_path / "deep" / "metrics.jsonl")
    first.log(ROWS[0])
    assert read(tmp_path / "deep" / "metrics.jsonl") == ROWS[:1]
    first.close()
    second = JsonlMonitor(tmp_path / "deep" / "metrics.jsonl")
    second.log(ROWS[1])
    second.close()
    assert read(tmp_path / "deep" / "metrics.jsonl") == ROWS


def test_online_without_a_key_becomes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monitor = open_monitor(tmp_path, "online", "stepladder", "test", {"seed": 0})
    for row in ROWS:
        monitor.log(row)
    monitor.close()
    assert read(tmp_path / "metrics.jsonl") == ROWS
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert run.stat().st_size > 0


def test_a_job_that_is_started_again_in_its_folder_continues_its_run(tmp_path: Path) -> None:
    """Another folder's is another run."""

    def run_id(directory: Path) -> str:
        monitor = WandbMonitor(directory, "offline", "stepladder", "test", {})
        found, resumes = monitor._run.id, monitor._run.settings.resume
        monitor.close()
        assert resumes == "allow" and list(directory.glob(f"wandb/offline-run-*-{found}*/*.wandb"))
        return found

    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first != run_id(tmp_path / "b")
    (tmp_path / "a" / "wandb-run-id.txt").write_text("")  # as a full disk leaves it
    assert run_id(tmp_path / "a") != first


def test_a_failing_run_stops_the_logging_to_wandb_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wandb = WandbMonitor(tmp_path, "offline", "stepladder", "test", {})
    monitor = Monitors(JsonlMonitor(tmp_path / "metrics.jsonl"), wandb)
    wandb._run.finish()  # a run that is over refuses to log
    for row in ROWS:
        monitor.log(row)
    monitor.close()
    assert read(tmp_path / "metrics.jsonl") == ROWS
    assert "W&B fails" in caplog.text


def test_a_directory_that_cannot_be_written_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    WandbMonitor(tmp_path / "file" / "below", "offline", "stepladder", "test", {}).close()
    assert "figures go to metrics.jsonl only" in caplog.text


def test_a_full_disk_loses_rows_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row that fits in half is not there at all, and the file goes on once there is room."""
    monitor = JsonlMonitor(tmp_path / "metrics.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        for _ in range(5):
            monitor.log(ROWS[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monitor.log(ROWS[1])
    monitor.close()
    rows = read(tmp_path / "metrics.jsonl")
    assert 1 <= len(rows) <= 2 and rows == [*ROWS[:1] * (len(rows) - 1), ROWS[1]]
    assert len([line for line in caplog.messages if "metrics.jsonl cannot be written" in line]) == 1
