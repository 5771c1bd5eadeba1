"""Figures reach the file whatever becomes of W&B."""

import json
import resource
import struct
import sys
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

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


def test_online_without_a_key_becomes_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monitor = open_monitor(tmp_path, "online", "stepladder", "test", {"seed": 0})
    for row in ROWS:
        monitor.log(row)
    monitor.close()
    assert read(tmp_path / "metrics.jsonl") == ROWS
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert run.stat().st_size > 0
    (said,) = [line for line in caplog.messages if "W&B" in line]
    assert said.startswith("W&B in mode online does not start (") and "the run is offline" in said and "\n" not in said


def test_without_the_package_figures_go_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monitor = open_monitor(tmp_path, "online", "stepladder", "test", {})
    for row in ROWS:
        monitor.log(row)
    monitor.log_version(7, version(tmp_path), {"overlap": 0.64}, ["live"])
    monitor.close()
    assert read(tmp_path / "metrics.jsonl") == ROWS
    (said,) = [line for line in caplog.messages if "W&B" in line]
    assert "W&B in mode offline does not start (" in said and said.endswith("; figures go to metrics.jsonl only")


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


def version(tmp_path: Path) -> Path:
    folder = tmp_path / "drafter" / "7"
    folder.mkdir(parents=True)
    (folder / "drafter.json").write_text("{}")
    (folder / "drafter.safetensors").write_bytes(bytes(100_000))
    return folder


def logged(tmp_path: Path) -> list[wandb_internal_pb2.ArtifactRecord]:
    """The artifacts in what `wandb sync` would send: records of LevelDB's log format behind a header of 7 bytes."""
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content, at, found = run.read_bytes(), 7, []
    while at + 7 <= len(content):
        size, kind = struct.unpack_from("<HB", content, at + 4)
        assert kind == 1 and at + 7 + size < 32768, "whole, and all in the first block"
        record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + size])
        at += 7 + size
        if record.WhichOneof("record_type") == "artifact":
            found.append(record.artifact)
    return found


def test_a_version_of_a_drafter_is_an_artifact(tmp_path: Path) -> None:
    """Offline by its files' hashes, not by copies: there is no end to versions."""
    folder = version(tmp_path)
    monitor = open_monitor(tmp_path, "offline", "stepladder", "test", {})
    monitor.log_version(7, folder, {"overlap": 0.64}, ["live"])
    monitor.log_version(7, folder, {"overlap": 0.64}, ["previous"])
    monitor.log({"drafter/version": 7, "drafter/acceptance": 0.5})
    monitor.close()
    first, second = logged(tmp_path)
    assert first.type == "drafter" and set(first.aliases) == {"latest", "live", "number-7"}
    assert set(second.aliases) == {"latest", "previous", "number-7"} and second.digest == first.digest
    assert second.name == first.name and json.loads(first.metadata) == {"number": 7, "overlap": 0.64}
    entries = {entry.path: (entry.ref, entry.size) for entry in first.manifest.contents}
    assert entries == {path.name: (path.as_uri(), path.stat().st_size) for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in tmp_path.glob("wandb/**/*") if path.is_file()) < 100_000
    assert read(tmp_path / "metrics.jsonl") == [{"drafter/version": 7, "drafter/acceptance": 0.5}]


def test_a_version_that_is_gone_or_not_wanted_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = open_monitor(tmp_path, "offline", "stepladder", "test", {})
    monitor.log_version(7, tmp_path / "gone", {}, ["live"])
    assert "W&B does not take version 7 of the drafter" in caplog.text
    monitor.log(ROWS[0])
    monitor.close()
    monitor.log_version(7, tmp_path / "gone", {}, ["live"])
    assert read(tmp_path / "metrics.jsonl") == ROWS[:1], "the rest goes on"
