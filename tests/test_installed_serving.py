"""`stepladder serve` as jobs of a Ray whose Python has the wheel: from no folder, and from a checkout that differs."""

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import stepladder
from tests.fresh import ROOT, FreshEnvironment, build_wheel, copy_of_checkout

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

OPTIONS = ("model=demo", "cluster=local", "layout.tp=2", "kv.tokens=512", "monitor=jsonl")
INSTALLED, OTHER = stepladder.__version__, "9.9.9"
COMMANDS = {
    "wheel": ("stepladder", "serve"),
    "checkout": ("python", "-m", "launch.serve"),
    "checkout-by-command": ("stepladder", "serve"),
}
RECORD = """
import os, sys
with open({file!r}, "a") as file:
    file.write(repr((os.getpid(), sys.orig_argv, __version__, __file__)) + "\\n")
"""


class Imported(NamedTuple):
    """A process that has imported Stepladder, and which."""

    pid: int
    command: list[str]
    version: str
    file: str


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(copy_of_checkout(folder / "checkout"), folder)
    return FreshEnvironment(folder / "environment", str(wheel))


@pytest.fixture(scope="module")
def folder(fresh: FreshEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkout of another version in it. Every process that imports it or the wheel says so in `imported`."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "empty").mkdir()
    public = copy_of_checkout(folder / "checkout") / "stepladder" / "__init__.py"
    public.write_text(public.read_text().replace(f'"{INSTALLED}"', f'"{OTHER}"'))
    for file in (public, fresh.packages / "stepladder" / "__init__.py"):
        file.write_text(file.read_text() + RECORD.format(file=str(folder / "imported")))
    return folder


@pytest.fixture(scope="module")
def answers(fresh: FreshEnvironment, folder: Path) -> dict[str, dict[str, Any]]:
    """What each job's deployment said."""
    jobs = [job(name, folder) for name in COMMANDS]
    words = ("python", "-P", ROOT / "tests" / "serve_jobs.py", json.dumps(jobs))
    done = fresh.run(*words, cwd=folder / "empty", seconds=390)
    assert done.returncode == 0, done.stderr
    return dict(zip(COMMANDS, json.loads(done.stdout.splitlines()[-1]), strict=True))


def job(name: str, folder: Path) -> tuple[str, str | None, list[str]]:
    """The job's name, its folder, and its command."""
    place = str(folder / "checkout") if "checkout" in name else None
    return name, place, [*COMMANDS[name], *OPTIONS, f"name={name}", f"run_dir={folder / name}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_process_of_a_job_runs_the_same_code(
    name: str, answers: dict[str, dict[str, Any]], folder: Path, fresh: FreshEnvironment
) -> None:
    answer = answers[name]
    assert {actor: len(pids) for actor, pids in answer["pids"].items()} == {
        "ray::ControllerActor": 1,
        "ray::GatewayActor": 1,
        "ray::RankActor": 2,
    }
    imported = [Imported(*ast.literal_eval(line)) for line in (folder / "imported").read_text().splitlines()]
    driver = {one.pid for one in imported if f"name={name}" in one.command}
    actors = {pid for pids in answer["pids"].values() for pid in pids}
    ours = [one for one in imported if one.pid in driver | actors]
    assert driver and {one.pid for one in ours} == driver | actors
    version = OTHER if "checkout" in name else INSTALLED
    assert {one.version for one in ours} == {version} == {answer["version"]} and answer["tokens"] == 8
    in_wheel = {Path(one.file).is_relative_to(fresh.folder) for one in ours}
    assert in_wheel == {"checkout" not in name}
