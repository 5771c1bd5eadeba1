"""Commands as they are typed: their help, sweeps, and what a refusal leaves behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stepladder.launch.where import IMPORTED_FROM as ROOT

MANUAL = (ROOT / "docs" / "operating.md").read_text()
GROUPS = {
    "serve": {"model", "cluster", "layout", "speculate", "train", "monitor", "+secrets"},
    "train": {"recipe"},
    "bench": {"suite"},
    "generate": {"model", "speculate"},
    "fetch": {"model"},
}


def command(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """One that ends with `code`, in a folder that holds nothing else."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(cwd / "home")}
    env.pop("RAY_ADDRESS", None)
    words = (sys.executable, "-m", f"stepladder.launch.{words[0]}", *words[1:])
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def options_of(text: str) -> dict[str, str]:
    """Option -> its meaning."""
    found = re.findall(r"^  ([\w.]+) = .*\n((?:      .*\n)*)", text, re.M)
    return {name: " ".join(said.split()) for name, said in found}


@pytest.mark.parametrize("name", GROUPS)
def test_help_has_the_commands_own_groups(name: str, tmp_path: Path) -> None:
    text = command(name, "--help", cwd=tmp_path).stdout
    groups = text.split("groups (")[1].split("\n\n")[0]
    assert set(re.findall(r"^  (\S+)", groups, re.M)) == GROUPS[name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("serve",), ("train", "recipe=convert"), ("generate",)], ids=" ".join)
def test_help_says_what_every_option_means(words: tuple[str, ...], tmp_path: Path) -> None:
    options = options_of(command(*words, "--help", cwd=tmp_path).stdout)
    assert len(options) > 15 and [name for name, said in options.items() if not said] == []


def test_help_of_a_command_with_few_options(tmp_path: Path) -> None:
    options = options_of(command("fetch", "--help", cwd=tmp_path).stdout)
    assert {"model.path", "model.name", "model.cache", "dtype"} == set(options) and all(options.values())


def test_help_is_of_what_was_chosen(tmp_path: Path) -> None:
    text = command("serve", "--help", "cluster=two_nodes", "name=mine", cwd=tmp_path).stdout
    assert "  cluster.hang_seconds = 30.0\n" in text and "  kv.tokens = null\n" in text and "  name = mine\n" in text
    assert "  prompts = (must be given)\n" in command("generate", "-h", cwd=tmp_path).stdout
    assert "secret" not in options_of(text)


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "layout.tp=0"),
        ("serve", "layout.tp=two", "run_dir=${hydra:runtime.cwd}/run"),
        ("train", "recipe=demo", "threads=0"),
        ("train", "recipe=convert", "model.path=/nowhere", "ladder_layers=1"),
        ("bench", "suite=engine", "repeats=0"),
        ("generate", "prompts=nothing.txt"),
    ],
    ids=" ".join,
)
def test_a_refused_start_leaves_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    done = command(*words, cwd=tmp_path, code=1)
    assert done.stderr.startswith("stepladder: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_a_sweep_are_apart_and_a_refused_one_ends_no_other(tmp_path: Path) -> None:
    """Two trainings that differ, the second of them refused, and a third; the same again continues each of them."""
    small = ["model.vocab_size=300", "model.hidden_size=16", "model.head_dim=8", "model.num_heads=2"]
    small += ["model.num_kv_heads=2", "model.intermediate_size=16", "model.num_layers=1", "model.max_position=64"]
    small += ["train.tokens=512", "train.batch_tokens=128", "train.contexts=[64]"]
    script = tmp_path / "small.py"
    script.write_text(
        "from stepladder.launch import train\n"
        "from stepladder.launch.recipes import demo_model\n"
        "whole = demo_model.standard_library()\n"
        "few = type(whole)(whole.train[:40], whole.held_out[:1])\n"
        "demo_model.standard_library = lambda: few\n"
        "train.main()\n"
    )
    words = [sys.executable, str(script), "--multirun", "recipe=demo", "train.seed=1,2", "threads=1,0", *small]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("stepladder: threads is 0; it must be at least 1") == 2
    runs = tmp_path / "runs" / "demo"
    folders = {path.name: path for path in runs.iterdir() if path.is_dir()}
    assert len(folders) == 2 and {path.name for path in tmp_path.iterdir()} == {"small.py", "runs"}
    figures = [json.loads((folder / "model" / "training.json").read_text()) for folder in folders.values()]
    assert {row["seed"] for row in figures} == {1, 2} and all("threads=1" in name for name in folders)
    for folder in folders.values():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["train/step"] for row in rows if "train/loss" in row] == [4]


def test_jobs_of_a_sweep_write_to_outputs_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def main\n")
    swept = ("--multirun", "prompts=p.txt", "sampling.max_tokens=1,3", "kv.tokens=64", "engine.max_model_len=64")
    command("generate", *swept, cwd=tmp_path)
    outputs = sorted(path for path in tmp_path.glob("*.jsonl"))
    tokens = [json.loads(path.read_text())["completion_tokens"] for path in outputs]
    assert tokens == [1, 3] and ["sampling.max_tokens=1" in outputs[0].name, "=3" in outputs[1].name] == [True, True]


def test_a_cluster_file_of_ones_own_works_as_the_manual_says(tmp_path: Path) -> None:
    """The example of the manual, word for word, but for the folder."""
    block = MANUAL.split("**A cluster of your own.**")[1].split("`--multirun`")[0]
    lines = [line[4:] for line in block.splitlines() if line.startswith("    ")]
    assert lines[0] == "# /etc/stepladder/cluster/rack7.yaml" and lines[-1].startswith("python -m launch.serve ")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "rack7.yaml").write_text("\n".join(lines[:-1]) + "\n")
    words = lines[-1].replace("/etc/stepladder", str(tmp_path)).split()[3:]
    shown = command("serve", *words, "--cfg", "job", cwd=tmp_path).stdout
    for line in ("hang_seconds: 45.0", "start_seconds: 1200.0", "strategy: STRICT_PACK", "max_sequences: 512"):
        assert line in shown
    for line in ("max_step_tokens: 8192", "tokens: null", "host: 0.0.0.0", "resource: node:__internal_head__"):
        assert line in shown
    assert "tp: 8" in shown and "device: cuda" in shown
