"""Checkpoints as others leave them: what `transformers` loads gives the same logits here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stepladder.parallel.checkpoint import check_weights, load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.config import EngineConfig, KvConfig
from tests.families import write_family
from tests.llama import write_llama
from tests.parallel.test_checkpoint import edit_config, edit_tensors

TOKENS = torch.randint(0, 101, (1, 40), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def logits(directory: Path) -> Tensor:
    model = Transformer(ModelSpec.load(directory)).requires_grad_(False)
    load_weights(model, directory)
    return model.logits(model(TOKENS.view(-1), WholeSequences(1, 40)))


@torch.inference_mode()
def theirs(directory: Path) -> Tensor:
    """In the dtype that it chooses itself."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", trust_remote_code=True
    )
    return model.eval()(TOKENS).logits[0]


def same(directory: Path, want: Tensor) -> None:
    got = logits(directory)
    assert got.dtype == want.dtype
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.1}[want.dtype]
    torch.testing.assert_close(got, want, rtol=0, atol=bound * float(want.abs().max()))


@pytest.fixture
def copy(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "copy"))


def rename(change: Callable[[str], str | None]) -> Callable[[dict[str, Tensor]], None]:
    """Of every tensor; None drops it."""

    def edit(tensors: dict[str, Tensor]) -> None:
        found = [(change(name), tensors.pop(name)) for name in list(tensors)]
        tensors.update({name: tensor for name, tensor in found if name})

    return edit


def test_a_tied_model_may_have_the_head_in_place_of_the_embedding(tied: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tied, tmp_path / "copy"))
    want = theirs(path)
    edit_tensors(path, rename(lambda name: "lm_head.weight" if "embed" in name else name))
    assert "model.embed_tokens.weight" not in load_file(path / "model.safetensors")
    same(path, want)
    edit_config(path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"has no tensor model\.embed_tokens\.weight"):
        logits(path)


def test_a_model_saved_without_its_head_lacks_the_prefix(tied: Path, tmp_path: Path) -> None:
    """As `LlamaModel.save_pretrained` writes it."""
    path = Path(shutil.copytree(tied, tmp_path / "copy"))
    want = theirs(path)
    edit_tensors(path, rename(lambda name: None if "lm_head" in name else name.removeprefix("model.")))
    assert torch.equal(theirs(path), want)
    same(path, want)


def test_a_stale_index_beside_whole_weights_is_ignored(copy: Path) -> None:
    want = theirs(copy)
    stale = {"model.norm.weight": "model-00001-of-00009.safetensors", "model.old.weight": "gone.safetensors"}
    for text in (json.dumps({"weight_map": stale}), "{"):
        (copy / "model.safetensors.index.json").write_text(text)
        same(copy, want)


BUFFERS = {
    "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 12),
    "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 8, 12),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6),
    "model.rotary_emb.inv_freq": torch.ones(6),
    "model.layers.1.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-torch.inf),
}


def test_buffers_of_old_checkpoints_are_ignored(copy: Path) -> None:
    want = theirs(copy)
    edit_tensors(copy, lambda tensors: tensors.update(BUFFERS))
    assert torch.equal(theirs(copy), want)
    same(copy, want)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama-linear", {"sliding_window": 7}),
        ("cohere", {"sliding_window": 7}),
        ("mistral", {"attention_bias": True}),
        ("mistral", {"mlp_bias": True}),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"mlp_bias": True}),
        ("cohere", {"mlp_bias": True}),
        ("llama3", {"hidden_act": "swish"}),
        ("qwen2", {"hidden_act": "swish"}),
        ("llama3", {"vocab_size": 101.0, "num_hidden_layers": 3.0, "eos_token_id": [3.0]}),
        ("llama-linear", {"dtype": None, "torch_dtype": "torch.float32"}),
    ],
)
def test_fields_that_change_nothing(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    want = theirs(write_family(tmp_path, family))
    edit_config(tmp_path, **fields)
    if not any(isinstance(value, float) for value in fields.values()) and "dtype" not in fields:
        assert torch.equal(theirs(tmp_path), want), "so it is in transformers"
    same(tmp_path, want)


def test_a_bias_that_a_family_has_not_is_not_left_out(tmp_path: Path) -> None:
    """Where the files have one, it is another model."""
    write_family(tmp_path, "mistral")
    edit_config(tmp_path, attention_bias=True)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}))
    with pytest.raises(ValueError, match=r"has the tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        check_weights(ModelSpec.load(tmp_path), tmp_path)


@pytest.mark.parametrize("silent", [{}, {"dtype": None}, {"torch_dtype": "auto"}])
def test_without_a_dtype_the_weights_decide(copy: Path, silent: dict[str, Any]) -> None:
    """Most of them: norms may be kept in fp32."""
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config | silent))
    assert ModelSpec.load(copy).dtype == torch.float32
    edit_tensors(copy, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert ModelSpec.load(copy).dtype == torch.bfloat16
    if "torch_dtype" not in silent:
        same(copy, theirs(copy))
    edit_tensors(copy, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    assert ModelSpec.load(copy).dtype == torch.bfloat16
    edit_config(copy, dtype="float16")
    assert ModelSpec.load(copy).dtype == torch.float16


LENGTHS: list[tuple[dict[str, Any], int]] = [
    ({"rope_type": "linear", "factor": 4.0}, 1024),
    ({"type": "linear", "factor": 2.5}, 640),
    ({"rope_type": "yarn", "factor": 4.0}, 1024),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),  # the scaled length is there
    ({"rope_type": "dynamic", "factor": 4.0}, 256),  # beyond it, frequencies would change with every length
    ({"rope_type": "default"}, 256),
]


@pytest.mark.parametrize(("rope", "longest"), LENGTHS)
def test_a_stretched_length_may_be_asked_for(copy: Path, rope: dict[str, Any], longest: int) -> None:
    """By default it is the one that the file names."""
    edit_config(copy, rope_parameters=None, rope_theta=5000.0, rope_scaling=rope)
    spec, kv = ModelSpec.load(copy), KvConfig(tokens=4096)
    assert EngineConfig().model_len(spec, kv, 4096) == 256
    assert EngineConfig(max_model_len=longest).model_len(spec, kv, 4096) == longest
    with pytest.raises(
        ValueError, match=f"max_model_len is {longest + 1}, but the model was made for {longest} tokens"
    ):
        EngineConfig(max_model_len=longest + 1).model_len(spec, kv, 4096)


def test_beyond_the_unscaled_length_it_is_as_in_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    write_llama(tmp_path, max_position_embeddings=16, rope_parameters=rope)
    same(tmp_path, theirs(tmp_path))  # 40 tokens


def test_weights_over_several_files_keep_working(copy: Path) -> None:
    """Links, as the cache of the Hugging Face hub has them, and folders below."""
    want, tensors = theirs(copy), load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    (copy / "parts").mkdir()
    elsewhere = copy.parent / "blob"
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, elsewhere)
    save_file({name: tensors[name] for name in names[1::2]}, copy / "parts" / "b.safetensors")
    (copy / "a.safetensors").symlink_to("../blob")
    files = {name: ("a.safetensors", "parts/b.safetensors")[at % 2] for at, name in enumerate(names)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    same(copy, want)
