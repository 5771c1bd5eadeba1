"""From `config.json` and `generation_config.json` to specs, in both spellings, with refusals that name the field."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer

from stepladder.kernels.rope import RopeScaling
from stepladder.parallel.families import FAMILIES as MODEL_TYPES
from stepladder.parallel.generation_defaults import GenerationDefaults
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.special_tokens import named_tokens
from tests.families import FAMILIES, LLAMA3


def config_of(path: Path, **fields: Any) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text()) | fields


def test_every_family_is_tested() -> None:
    """By `transformers`, where it has it, or as Step-3 in test_step3.py."""
    assert {fields["model_type"] for fields in FAMILIES.values()} | {"step3_text"} == set(MODEL_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_the_rope_fields(family: str, families: dict[str, Path]) -> None:
    new = config_of(families[family])
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(new["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": new["dtype"]}
    kind = rope.pop("rope_type")
    for spelled in ({"type": kind}, {"rope_type": kind}):
        scaling = None if kind == "default" else spelled | rope
        assert ModelSpec.from_config(old | {"rope_scaling": scaling}) == ModelSpec.from_config(new)


def test_rope_scaling_is_read(families: dict[str, Path]) -> None:
    want = RopeScaling(kind="llama3", factor=8.0, low=1.0, high=4.0, original_positions=32)
    assert ModelSpec.load(families["llama3"]).rope_scaling == want
    assert ModelSpec.load(families["llama-linear"]).rope_scaling == RopeScaling(kind="linear", factor=4.0)
    without = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    spec = ModelSpec.from_config(config_of(families["llama3"], rope_parameters=without))
    assert spec.rope_scaling is not None and spec.rope_scaling.original_positions == spec.max_position


@pytest.mark.parametrize("model_type", [name for name, family in MODEL_TYPES.items() if family.in_transformers])
def test_silent_configs_mean_what_transformers_assumes(model_type: str, tmp_path: Path) -> None:
    """Only the shapes are given; every other value comes from the family's defaults."""
    given: dict[str, Any] = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 30}
    given |= {"num_attention_heads": 32, "rope_theta": 10000.0, "model_type": model_type}
    theirs, ours = AutoConfig.for_model(**given), ModelSpec.from_config(given)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_eps
    assert (ours.experts is not None) == model_type.endswith(("moe", "mixtral"))
    if experts := ours.experts:
        assert experts.count == (theirs.num_local_experts if model_type == "mixtral" else theirs.num_experts)
        assert experts.per_token == theirs.num_experts_per_tok and experts.layers == tuple(range(30))
        assert experts.inner == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert experts.shared_inner == getattr(theirs, "shared_expert_intermediate_size", 0)
        assert experts.renormalise == getattr(theirs, "norm_topk_prob", True)
    assert ours.logit_scale == getattr(theirs, "logit_scale", 1.0)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.windows == ((4096,) * 30 if model_type == "mistral" else ())
    if model_type.startswith("qwen"):
        ours = ModelSpec.from_config(given | {"use_sliding_window": True})
        assert ours.windows == ((4096,) * 30 if model_type == "qwen3_moe" else (None,) * 28 + (4096,) * 2)


def test_windows_of_layers(families: dict[str, Path]) -> None:
    assert ModelSpec.load(families["mistral"]).windows == (7, 7, 7)
    assert ModelSpec.load(families["qwen2"]).windows == (None, 9, 9)
    assert ModelSpec.load(families["qwen3"]).windows == (5, None, 5)
    assert ModelSpec.from_config(config_of(families["mistral"], sliding_window=None)).windows == ()
    off = config_of(families["qwen2"], use_sliding_window=False, layer_types=None)
    assert ModelSpec.from_config(off).windows == ()
    old = config_of(families["qwen2"], layer_types=None)  # before transformers 5: by max_window_layers
    assert ModelSpec.from_config(old).windows == (None, 9, 9)


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types is .* for mistral only"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1; it must be an integer from 0"),
        ("qwen2", {"use_sliding_window": False}, "layer_types has 'sliding_attention', but sliding_window is not set"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types is .*it must name"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True; for qwen2 only False"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters has 'full_attention'"),
        ("qwen3", {"rope_scaling": {"rope_type": "proportional"}}, "rope_type is 'proportional'; this version does"),
        ("llama3", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "0 < low_freq_factor < high_freq_factor"),
        ("llama3", {"use_qk_norm": True}, "use_qk_norm is True; for llama only False"),
        ("cohere", {"logit_scale": None}, "logit_scale is None; it must be a positive number"),
        (
            "cohere",
            {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3},
            "layer_types is .* for cohere only",
        ),
        ("cohere", {"ladder_layers": 2}, "ladder_layers needs residual: ladder or ladder-parallel, not 'parallel'"),
        ("cohere", {"residual": "standard", "ladder_layers": [1]}, "ladder_layers needs residual"),
        ("cohere", {"model_type": "cohere2"}, "model_type is 'cohere2'; this version serves cohere, llama, mistral"),
    ],
)
def test_what_is_not_supported_is_one_sentence(
    family: str, fields: dict[str, Any], sentence: str, families: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        ModelSpec.from_config(config_of(families[family], **fields))
    assert "\n" not in str(caught.value)


def test_fields_that_ask_for_nothing(families: dict[str, Path]) -> None:
    """As published checkpoints have them."""
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    plain = ModelSpec.from_config(config_of(families["llama3"], rope_parameters=None, rope_scaling=yarn))
    for more in ({"finetuned": True}, {"finetuned": False}, {"attn_factor": 1.0, "extrapolation_factor": 1}):
        spec = ModelSpec.from_config(config_of(families["llama3"], rope_parameters=None, rope_scaling=yarn | more))
        assert spec == plain
    for name in ("attn_factor", "extrapolation_factor"):
        with pytest.raises(ValueError, match=f"rope_parameters has '{name}'"):
            ModelSpec.from_config(config_of(families["llama3"], rope_parameters=None, rope_scaling=yarn | {name: 2}))
    neutral: dict[str, Any] = {"num_experts": 0, "num_local_experts": 0, "quantization_config": {}}
    assert ModelSpec.from_config(config_of(families["llama3"], **neutral)) == ModelSpec.load(families["llama3"])


def test_cohere_needs_its_rope_theta(families: dict[str, Path], tmp_path: Path) -> None:
    """transformers 4 assumes 10000, transformers 5 assumes 500000."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(families["cohere"], rope_parameters=None)))
    with pytest.raises(ValueError, match=r"config\.json lacks the field 'rope_theta'"):
        ModelSpec.load(tmp_path)


def test_the_native_wiring_is_the_default(families: dict[str, Path]) -> None:
    native = {family: ModelSpec.load(path).residual for family, path in families.items()}
    assert native == {family: "parallel" if family.startswith("cohere") else "standard" for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_round_trip(family: str, families: dict[str, Path]) -> None:
    spec = ModelSpec.load(families[family])
    assert ModelSpec.from_config(json.loads(json.dumps(spec.to_config()))) == spec


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "cohere"])
def test_what_a_family_cannot_describe_is_not_written_as_that_family(family: str, families: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="the configuration of 'llama' cannot describe it"):
        replace(ModelSpec.load(families[family]), family="llama").to_config()


@pytest.fixture
def copy(families: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(families["qwen3"], tmp_path / "copy"))


def write_generation(path: Path, **fields: Any) -> None:
    (path / "generation_config.json").write_text(json.dumps(fields))


def test_generation_defaults(copy: Path) -> None:
    write_generation(
        copy,
        do_sample=True,
        eos_token_id=[7, 9],
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=None,
        repetition_penalty=1.05,
        max_new_tokens=2048,
        transformers_version="5.0.0",
    )
    defaults = GenerationDefaults.load(copy)
    assert defaults.sampling == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert defaults.eos_ids == ModelSpec.load(copy).eos_ids == (7, 9)


def test_eos_ids_come_from_the_generation_config_where_it_names_them(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps(config_of(copy, eos_token_id=5)))
    (copy / "generation_config.json").unlink()
    assert ModelSpec.load(copy).eos_ids == (5,)
    assert GenerationDefaults.load(copy) == GenerationDefaults()
    write_generation(copy, temperature=0.5)
    assert ModelSpec.load(copy).eos_ids == (5,)
    write_generation(copy, eos_token_id=6)
    assert ModelSpec.load(copy).eos_ids == (6,)


@pytest.mark.parametrize(
    ("config", "tokenizer", "eos_ids"),
    [
        ({"eos_token": "<|im_end|>"}, {}, (5,)),
        ({"eos_token": "<|im_end|>"}, {"added_tokens": [{"id": 7, "content": "<|im_end|>"}]}, (5, 7)),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, {"model": {"vocab": {"</s>": 8}}}, (5, 8)),
        ({"eos_token": "b", "added_tokens_decoder": {"3": {"content": "a"}, "9": {"content": "b"}}}, {}, (5, 9)),
        ({"eos_token": "a"}, {"added_tokens": [{"id": 5, "content": "a"}]}, (5,)),
        ({"eos_token": "a"}, {"added_tokens": [{"id": 10**6, "content": "a"}]}, (5,)),
        ({"eos_token": None}, {"model": {"vocab": [["a", -1.0]]}}, (5,)),
        ({"eos_token": "b"}, {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}, (5, 1)),
        ({"eos_token": "b"}, {"model": {"type": "Unigram", "vocab": [["a", -1.0], 5, ["c"]]}}, (5,)),
        ([], {}, (5,)),
    ],
)
def test_the_end_that_only_the_tokenizer_names_is_one(
    copy: Path, config: Any, tokenizer: dict[str, Any], eos_ids: tuple[int, ...]
) -> None:
    """As chat models have it whose other files name the end of a document; not beyond the vocabulary."""
    write_generation(copy, eos_token_id=5)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert ModelSpec.load(copy).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("decoder", "tokenizer", "sentence"),
    [
        (None, {"added_tokens": [{"id": "x", "content": "a"}]}, r"tokenizer\.json: added_tokens\[0\]\.id is 'x'"),
        (None, {"added_tokens": [{"id": [1], "content": "a"}]}, r"tokenizer\.json: added_tokens\[0\]\.id is \[1\]"),
        (None, {"added_tokens": [{}, {"id": 1.5, "content": "a"}]}, r"tokenizer\.json: added_tokens\[1\]\.id is 1\.5"),
        (None, {"added_tokens": [{"id": -5, "content": "a"}]}, r"tokenizer\.json: added_tokens\[0\]\.id is -5"),
        (None, {"added_tokens": [{"id": True, "content": "a"}]}, r"tokenizer\.json: added_tokens\[0\]\.id is True"),
        (None, {"added_tokens": [{"content": "a"}]}, r"tokenizer\.json: added_tokens\[0\]\.id is None"),
        (None, {"added_tokens": ["a"]}, r"tokenizer\.json: added_tokens\[0\]\.id is 'a'"),
        (None, {"added_tokens": 5}, r"tokenizer\.json: added_tokens is 5; it must be a list"),
        (None, {"model": {"vocab": {"a": "x"}}}, r"tokenizer\.json: model\.vocab\['a'\] is 'x'"),
        ({"9" * 5000: {"content": "a"}}, {}, r"tokenizer_config\.json: the name of 'a' in added_tokens_decoder is '9"),
        ({"-1": {"content": "a"}}, {}, r"tokenizer_config\.json: the name of 'a' in added_tokens_decoder is '-1'"),
        (5, {}, r"tokenizer_config\.json: added_tokens_decoder is 5; it must be an object"),
    ],
)
def test_an_end_with_an_odd_id_is_named(copy: Path, decoder: Any, tokenizer: dict[str, Any], sentence: str) -> None:
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a", "added_tokens_decoder": decoder}))
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=sentence) as found:
        ModelSpec.load(copy)
    assert len(str(found.value)) < 400


def test_named_tokens_are_those_of_transformers(copy: Path) -> None:
    """Also from the file that old directories have."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3}, unk_token="a"))
    tokenizer.save(str(copy / "tokenizer.json"))
    for files in (
        {"tokenizer_config": {"pad_token": "<pad>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}},
        {"special_tokens_map": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}, "tokenizer_config": {}},
    ):
        for name, fields in files.items():
            loadable = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer_config" else {}
            (copy / f"{name}.json").write_text(json.dumps(fields | loadable))
        assert named_tokens(copy) == AutoTokenizer.from_pretrained(copy).special_tokens_map
        for name in files:
            (copy / f"{name}.json").unlink()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_impossible_defaults_are_named(fields: dict[str, Any], named: str, copy: Path) -> None:
    write_generation(copy, **fields)
    with pytest.raises(ValueError, match=rf"generation_config\.json: {named} is "):
        ModelSpec.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_generation_config_is_named(copy: Path, text: str) -> None:
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        ModelSpec.load(copy)
