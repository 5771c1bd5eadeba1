"""A benchmark that is ended from outside: it cleans up, and harms no result that was already there."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from stepladder.launch.report import Report, Row, publish

ROOT = Path(__file__).parents[2]
HOLDS_A_FOLDER = """
import runpy, sys, time
from tempfile import TemporaryDirectory
from stepladder.launch.bench.failures import suite as failures

def run(config):
    with TemporaryDirectory(dir=config.run_dir) as folder:
        try:
            print(folder, flush=True)
            time.sleep(60)
        finally:
            print("unwinding", flush=True)
            time.sleep(0.5)
            print("unwound", flush=True)

failures.SUITE = failures.FailuresBench, run
sys.argv = ["bench", "suite=failures", "run_dir=" + sys.argv[1]]
runpy.run_module("launch.bench", run_name="__main__", alter_sys=True)
"""


def test_sigterm_unwinds_and_a_second_one_does_not_break_that_off(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_A_FOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir() and folder.parent == tmp_path
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "unwinding\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "unwound\n"
        assert process.wait(30) == 143
    assert not folder.exists()


def test_a_result_that_is_cut_off_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    publish(Report("demo", [Row("a", "speed", 1.0, "s")], {}), [], tmp_path)
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        publish(Report("demo", [Row("a", "speed", 2.0, "s")], {}), [], tmp_path)
    assert json.loads((tmp_path / "demo.json").read_text())["rows"][0]["value"] == 1.0


def test_a_picture_that_is_cut_off_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_: Figure, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    report = Report("demo", [Row("a", "speed", 1.0, "s")], {})
    publish(report, [], tmp_path)
    before = (tmp_path / "demo.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(KeyboardInterrupt):
        publish(report, [], tmp_path)
    assert (tmp_path / "demo.png").read_bytes() == before
