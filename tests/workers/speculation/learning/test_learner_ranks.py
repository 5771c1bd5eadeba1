"""Two ranks (processes, gloo) learn what one learns, with ZeRO 1, 2 and 3, and end with the same weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llama import write_llama
from tests.workers.speculation.learning.learn_on_ranks import STAGES

ROOT = Path(__file__).parents[4]


def launch(model: Path, out: Path, ranks: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = [*torchrun, "-m", "tests.workers.speculation.learning.learn_on_ranks", str(model), str(out)]
    built = out / "extensions"
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(built)}
    done = subprocess.run(
        [sys.executable, *script], cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not built.exists(), "nothing is compiled, at no stage"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, list[dict[str, Any]]]]:
    """By stage, by number of ranks, by rank."""
    model, found = write_llama(tmp_path_factory.mktemp("model"), seed=3), dict[int, dict[int, list[Any]]]()
    for size in (1, 2):
        out = tmp_path_factory.mktemp(f"{size}-ranks")
        launch(model, out, size)
        for stage in STAGES:
            files = [out / f"{stage}-{rank}-of-{size}.pt" for rank in range(size)]
            found.setdefault(stage, {})[size] = [torch.load(file, weights_only=True) for file in files]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_end_with_the_same_weights(results: dict[int, dict[int, list[dict[str, Any]]]], stage: int) -> None:
    (alone,), (first, second) = results[stage][1], results[stage][2]
    for when in ("first", "weights"):
        for name, weight in first[when].items():
            assert torch.equal(weight, second[when][name]), (when, name)
    assert first["losses"] == second["losses"] and first["tokens"].tolist() == second["tokens"].tolist()
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3), "rank 0 draws the same places in all"
    for name, weight in alone["weights"].items():
        assert (first["weights"][name] - weight).abs().max() < 2e-3, name
    assert sum(first["losses"][-6:]) < sum(first["losses"][:6]) - 1
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_keeps_half_of_the_optimizers_state(
    results: dict[int, dict[int, list[dict[str, Any]]]], stage: int
) -> None:
    (alone,), shards = results[stage][1], results[stage][2]
    for shard in shards:
        assert shard["state"] == pytest.approx(alone["state"] / 2, rel=0.06)


def test_the_stages_learn_the_same(results: dict[int, dict[int, list[dict[str, Any]]]]) -> None:
    """And start anew alike: the optimizer's state is not that of before."""
    one, *others = (results[stage][1][0] for stage in STAGES)
    for other in others:
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
