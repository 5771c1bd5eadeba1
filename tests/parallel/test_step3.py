"""Step-3's attention and experts against a definition in fp64: TP and AFD, both dispatches, two wirings; its files."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepladder.parallel.checkpoint import load_weights, save_weights
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import FactoredAttention
from stepladder.parallel.native import NATIVE, TORCH
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.sizing import bytes_per_token
from tests.parallel.test_disaggregate import Batch, Checkpoint, apart
from tests.parallel.test_transformers import load, run_in_steps
from tests.ranks import run_ranks
from tests.step3 import SMALL, Step3, write_step3

COUNT, PROMPT = 64, [5, 17, 99, 3, 42, 8, 61]
WIRINGS = {"standard": 0, "ladder": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("step3")
    return {name: write_step3(folder / name, residual=name) for name in WIRINGS}


@cache
def wanted(path: Path, lag: int) -> tuple[list[int], Tensor]:
    """64 greedy tokens, and the logits of every position before them."""
    model = Step3(path, lag)
    text = model.greedy(PROMPT, COUNT)
    assert len(set(text)) > 8, "a degenerate text proves little"
    return text, model.logits(PROMPT + text)[:-1]


def check(got: Tensor, path: Path, wiring: str) -> None:
    """got: logits of the prompt and the text, which were fed in."""
    text, logits = wanted(path, WIRINGS[wiring])
    assert (got[: len(logits)] - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert got[len(PROMPT) - 1 : len(PROMPT) - 1 + COUNT].argmax(-1).tolist() == text


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("tp", [1, 2])
def test_tensor_parallel_ranks_compute_step3(tp: int, wiring: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[wiring]
    tokens = PROMPT + wanted(path, WIRINGS[wiring])[0]

    def rank_main(mesh: Mesh) -> list[list[Tensor]]:
        kinds = [(kernels, whole) for kernels in (TORCH, NATIVE) for whole in (False, True)]
        return [
            run_in_steps(load(path, mesh, kernels, whole_experts=whole), mesh, [tokens], chunk)
            for kernels, whole in kinds
            for chunk in (64, 9, 1)
        ]

    for sequences in run_ranks(tp, rank_main)[0]:
        check(sequences[0], path, wiring)


@pytest.mark.parametrize("home", [False, True], ids=["broadcast", "home"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_attention_and_experts_apart_compute_step3(wiring: str, home: bool, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[wiring]
    kept = Checkpoint(path, whole_experts=home, home=home)
    [steps] = apart(ModelSpec.load(path), kept, [Batch([[PROMPT]])], num_f=2, steps=COUNT)
    check(torch.cat([micro[0] for micro in steps]), path, wiring)


def test_its_files_are_read_and_written_as_theirs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    spec = ModelSpec.load(checkpoints["standard"])
    assert spec.experts and spec.experts.layers == (1, 2) and not spec.experts.renormalise
    assert ModelSpec.from_config(spec.to_config()) == spec
    model = Transformer(spec)
    load_weights(model, checkpoints["standard"])
    save_weights(model, tmp_path, torch.float32)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (checkpoints["standard"], tmp_path))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert not (tmp_path / "modeling_stepladder.py").exists()


def test_a_wiring_of_its_own_has_a_name_of_its_own_and_no_code_that_cannot_run(checkpoints: dict[str, Path]) -> None:
    config = ModelSpec.load(checkpoints["ladder"]).to_config()
    assert config["model_type"] == "stepladder_step3_text" and "auto_map" not in config
    assert ModelSpec.from_config(config) == ModelSpec.load(checkpoints["ladder"])


def test_only_one_head_is_cached_and_the_first_step_is_on_every_rank(checkpoints: dict[str, Path]) -> None:
    spec = ModelSpec.load(checkpoints["standard"])
    assert bytes_per_token(spec, 1) == 2 * 4 * 12 * 4
    for size in (1, 2, 4):
        model = Transformer(spec, Shard(0, size))
        [first, *_] = (m for m in model.modules_of_blocks if isinstance(m, FactoredAttention))
        assert model.num_kv_heads == 1 and first.qkv.shape == (20 + 2 * 12, 32)
        assert first.queries.shape == (48 // size, 20) and first.out.shape == (32, 48 // size)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_attention_groups": 2}, "num_attention_groups is 2; only 1 is supported"),
        ({"moe_layers_enum": "1,9"}, "moe_layers_enum is '1,9'; it must name layers 0 to 3"),
        ({"moe_layers_enum": "1,b"}, "moe_layers_enum is '1,b'; it must name layers 0 to 3"),
        ({"moe_top_k": 8}, "from 1 to the number of experts, 7"),
    ],
)
def test_what_cannot_be_is_one_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        ModelSpec.from_config(SMALL | fields)


def test_experts_of_another_number_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = write_step3(tmp_path / "it", moe_num_experts=6)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"moe_num_experts": 7}))
    with pytest.raises(ValueError, match=r"has shape \(6, "):
        load_weights(Transformer(ModelSpec.load(path)), path)


def test_all_layers_dense_is_a_model_too(tmp_path: Path) -> None:
    path = write_step3(tmp_path / "dense", moe_layers_enum="")
    assert ModelSpec.load(path).experts is None
    got = run_in_steps(load(path, SingleRank()), SingleRank(), [PROMPT], 64)[0]
    want = Step3(path).logits(PROMPT)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert ModelSpec.from_config(ModelSpec.load(path).to_config()) == ModelSpec.load(path)
