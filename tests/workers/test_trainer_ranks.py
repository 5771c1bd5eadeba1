"""Two data-parallel ranks (processes, gloo) train what one rank trains, each with half of the optimiser's state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def launch(directory: Path, ranks: int) -> None:
    """The script under `torchrun`, or alone: without any launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = [*torchrun, "-m", "tests.workers.train_on_ranks"] if torchrun else ["-m", "tests.workers.train_on_ranks"]
    built = directory / "extensions"
    done = subprocess.run(
        [sys.executable, *script, str(directory)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(built)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DeepSpeed" not in done.stdout + done.stderr
    assert not built.exists()  # nothing that needs a C++ compiler, and two minutes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict]]]:
    found: dict[str, dict[str, list[dict]]] = {"muon": {}, "adamw": {}}
    for size in (1, 2):
        directory = tmp_path_factory.mktemp(f"{size}-ranks")
        for name in found:
            (directory / name).mkdir()
        launch(directory, size)
        for name, by_size in found.items():
            files = [directory / f"{name}-{rank}-of-{size}.pt" for rank in range(size)]
            by_size[str(size)] = [torch.load(file, weights_only=True) for file in files]
    return found


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_ranks_train_what_one_trains(results: dict[str, dict[str, list[dict]]], optimizer: str) -> None:
    (alone,), (first, second) = results[optimizer]["1"], results[optimizer]["2"]
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert (first["weights"][name] - weight).abs().max() < 1e-5, name
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_rank_keeps_half_of_the_optimiser_state(results: dict[str, dict[str, list[dict]]], optimizer: str) -> None:
    (alone,), shards = results[optimizer]["1"], results[optimizer]["2"]
    for shard in shards:
        assert shard["state"] == pytest.approx(alone["state"] / 2, rel=0.06)
