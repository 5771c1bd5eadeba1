"""A model with a wiring of its own has a name of ours; `transformers` computes it with the code beside its weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stepladder.parallel.checkpoint import load_weights, save_weights
from stepladder.parallel.families import FAMILIES as MODEL_TYPES
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from tests.families import FAMILIES
from tests.llama import oracle_greedy
from tests.parallel.test_strange_checkpoints import TOKENS, logits, same, theirs

WIRINGS = {
    "ladder": ("ladder", None),
    "ladder of some layers": ("ladder", (0, 2)),
    "ladder of no layer": ("ladder", ()),
    "ladder-parallel": ("ladder-parallel", (1,)),
    "parallel": ("parallel", None),
    "standard": ("standard", None),
}


def write(source: Path, directory: Path, wiring: str) -> ModelSpec:
    """The same weights under another wiring."""
    residual, layers = WIRINGS[wiring]
    spec = replace(ModelSpec.load(source), residual=residual, ladder_layers=layers)
    model = Transformer(spec).requires_grad_(False)
    load_weights(model, source)
    save_weights(model, directory, torch.float32)
    (directory / "config.json").write_text(json.dumps(spec.to_config()))
    return spec


def remote(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, attn_implementation="eager").eval()


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_compute_the_same(family: str, wiring: str, families: dict[str, Path], tmp_path: Path) -> None:
    spec = write(families[family], tmp_path, wiring)
    assert ModelSpec.load(tmp_path) == spec
    config = json.loads((tmp_path / "config.json").read_text())
    native = spec.residual == MODEL_TYPES[spec.family].residual
    assert (config["model_type"] in CONFIG_MAPPING) == native == (not (tmp_path / "modeling_stepladder.py").exists())
    same(tmp_path, theirs(tmp_path))
    if wiring != "ladder of no layer" and not native:
        original = logits(families[family])
        assert not torch.allclose(logits(tmp_path), original, rtol=1e-2, atol=1e-2), "it is another model"


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "cohere"])
def test_transformers_refuses_it_without_trust(family: str, families: dict[str, Path], tmp_path: Path) -> None:
    """In place of computing another model without a word."""
    write(families[family], tmp_path, "ladder")
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "cohere-qk-norm"])
def test_it_generates_and_is_saved(family: str, families: dict[str, Path], tmp_path: Path) -> None:
    """With its cache, token by token; what `transformers` saves is again this model, for both."""
    (tmp_path / "ours").mkdir()
    write(families[family], tmp_path / "ours", "ladder")
    model, prompt = remote(tmp_path / "ours"), TOKENS[0, :9].tolist()
    longer = torch.tensor([[*prompt, *oracle_greedy(model, prompt, 12)]])
    with torch.inference_mode():
        assert longer[0, 9:].tolist() == model(longer).logits[0, 8:-1].argmax(-1).tolist()
    model.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "ours/model.safetensors").keys()
    )
    assert torch.equal(theirs(tmp_path / "again"), theirs(tmp_path / "ours"))
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "ours"))


def test_the_older_spelling_is_read(families: dict[str, Path], tmp_path: Path) -> None:
    """A family's own name with our fields, as written before there was another."""
    spec = write(families["qwen3"], tmp_path, "ladder of some layers")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("auto_map") and config["model_type"] == "stepladder_qwen3"
    older = config | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assert ModelSpec.from_config(older) == spec
    with pytest.raises(ValueError, match="model_type is 'stepladder_gpt2'; this version serves cohere, llama"):
        ModelSpec.from_config(config | {"model_type": "stepladder_gpt2"})
