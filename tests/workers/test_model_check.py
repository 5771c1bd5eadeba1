"""Whatever lies in a model directory is one sentence with file, field and value, before anything is started."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepladder import LLM
from stepladder.launch.serve import check_here, deployment_of
from stepladder.parallel.checkpoint import check_weights, sharded_parameters
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.config import EngineConfig
from stepladder.workers.memory import available
from stepladder.workers.model_check import check_memory, check_model, recommended_params
from tests.cluster.models import write_random
from tests.composed import composed

HUGE = "1" + "0" * 400
NUMBERS = ["null", '"1024"', "1024.5", "-1", "0", "true", HUGE, "NaN", "Infinity", "[1]", "{}"]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def refused(directory: Path, file: str, *words: str) -> str:
    """The sentence: by `check_model`, which `LLM`, the driver and every node call."""
    with pytest.raises(ValueError) as caught:
        check_model(str(directory), EngineConfig())
    sentence = str(caught.value)
    assert f"{directory / file}" in sentence and all(word in sentence for word in words), sentence
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


def put(directory: Path, file: str, field: str, value: str) -> None:
    """`value` is JSON, which `json` itself may not write."""
    path = directory / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {field: "PLACE"}).replace('"PLACE"', value))


CASES = [
    *((field, value) for field in (*SIZES, "max_position_embeddings") for value in NUMBERS),
    *((field, str(10**9)) for field in SIZES),
    *((field, value) for field in ("num_key_value_heads", "head_dim") for value in NUMBERS if value != "null"),
    *(("rms_norm_eps", value) for value in NUMBERS),
    *(("rope_theta", value) for value in NUMBERS if value not in ("null", "1024.5")),
    *(("eos_token_id", value) for value in ('"x"', "-7", "[2, -7]", "1.5", "true", "[null]", HUGE, "300", "[1, 300]")),
    *(("rope_scaling", value) for value in ("[1]", "7", "true", '{"rope_type": [1]}', '{"type": {}}')),
    *(("tie_word_embeddings", value) for value in ('"false"', "2", "[]")),
    *(("layer_types", value) for value in ("7", '"full_attention"', "[1, 2, 3]", '{"a": 1}')),
    *(("hidden_act", value) for value in ("7", "[]", "{}")),
    *(("dtype", value) for value in ("7", '["bfloat16"]', '"int4"')),
    *(("ladder_layers", value) for value in ("true", "1.5", '"2"', "[true]")),
    *(("residual", value) for value in ("7", "[]", '"other"')),
    *(("model_type", value) for value in ("[]", "{}", "null", "7", '"gpt2"')),
    *(("sliding_window", value) for value in ('"8"', "-1", "1.5")),
]


@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda text: text[:24])
def test_a_field_of_another_type_or_range(field: str, value: str, copy: Path) -> None:
    put(copy, "config.json", field, value)
    if field == "rope_scaling":
        put(copy, "config.json", "rope_parameters", "null")
    refused(copy, "config.json", "rope_" if field == "rope_scaling" else field)


ROPES = [
    '{"rope_type": "linear", "factor": "4"}',
    '{"rope_type": "linear", "factor": 0}',
    '{"rope_type": "linear", "factor": NaN}',
    '{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}',
    '{"rope_type": "yarn", "factor": 4, "beta_fast": []}',
    '{"rope_type": "yarn", "factor": 4, "truncate": 1}',
    '{"rope_type": "yarn", "factor": 4, "rope_theta": 0}',
    '{"rope_type": "longrope", "short_factor": ["1"], "long_factor": [1]}',
    '{"rope_type": "longrope", "short_factor": [], "long_factor": []}',
    '{"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1]}',
    '{"rope_type": "longrope", "short_factor": 7, "long_factor": 7}',
]


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_fields(field: str, rope: str, copy: Path) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        put(copy, "config.json", name, rope if name == field else "null")
    refused(copy, "config.json")


GENERATION = [
    *(("top_k", value) for value in ("50.5", "-2", "18446744073709551616", '"50"', "true", HUGE, "NaN")),
    *(("max_new_tokens", value) for value in ("0", "1.5", '"8"', "[8]", HUGE)),
    *(("temperature", value) for value in ("-1", "2.5", "NaN", "Infinity", "true", HUGE)),
    *(("top_p", value) for value in ("0", "1.5", "[]")),
    *(("min_p", value) for value in ("-0.1", "2")),
    *(("repetition_penalty", value) for value in ("0", "1e9", '"1"')),
    *(("eos_token_id", value) for value in ('"x"', "-7", "300", "[3, 300]", "{}", HUGE)),
]


@pytest.mark.parametrize(("field", "value"), GENERATION, ids=lambda text: text[:24])
def test_a_recommendation_that_no_sampler_can_use(field: str, value: str, copy: Path) -> None:
    put(copy, "generation_config.json", field, value)
    refused(copy, "generation_config.json", field)


def test_whole_numbers_written_as_floats_are_integers(copy: Path) -> None:
    for field, value in {
        "top_k": "50.0",
        "max_new_tokens": "64.0",
        "eos_token_id": "[3.0]",
        "temperature": "1",
    }.items():
        put(copy, "generation_config.json", field, value)
    params = recommended_params(str(copy))
    assert (params.top_k, params.max_tokens) == (50, 64)
    assert isinstance(params.top_k, int) and isinstance(params.max_tokens, int)
    assert ModelSpec.load(copy).eos_ids == (3, 256), "the file's, and the tokenizer's own"
    llm = LLM(str(copy), kv_tokens=2048, max_model_len=256)
    assert llm.defaults == params and llm.generate("a")[0].tokens


TOKENIZER = [
    *(
        ("chat_template", value)
        for value in ("[5]", "7", "{}", '[{"name": "default"}]', '[{"name": 1, "template": ""}]')
    ),
    *(("eos_token", value) for value in ("7", "[]", '{"content": 5}', "{}")),
    ("bos_token", "true"),
]


@pytest.mark.parametrize(("field", "value"), TOKENIZER)
def test_fields_of_the_tokenizer(field: str, value: str, copy: Path) -> None:
    put(copy, "tokenizer_config.json", field, value)
    refused(copy, "tokenizer_config.json", field)


FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
TEXTS = ("chat_template.jinja", "model.safetensors.index.json")
DEEP = 200_000


@pytest.mark.parametrize("file", FILES[:4])
@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"5",
        b"",
        b"{",
        "{}".encode("utf-16"),
        "{}".encode("utf-16-le"),
        b"\xff\xfe\xfd",
        b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b"[" * DEEP,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=range(11),
)
def test_files_that_are_something_else(file: str, content: bytes, copy: Path) -> None:
    (copy / file).write_bytes(content)
    refused(copy, file)


@pytest.mark.parametrize("file", [*FILES, *TEXTS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "link in a circle"])
def test_what_is_no_file_is_not_waited_for(file: str, kind: str, copy: Path) -> None:
    path, pipe = copy / file, copy.parent / "pipe"
    path.unlink(missing_ok=True)
    if file == TEXTS[1]:
        (copy / FILES[4]).unlink()
    os.mkfifo(pipe)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(pipe if kind == "link to a pipe" else path)
    refused(copy, file)


def test_files_without_end_are_not_read(copy: Path) -> None:
    with (copy / "config.json").open("wb") as file:
        file.truncate(10**12)  # sparse
    refused(copy, "config.json", "1000000000000 bytes")


@pytest.mark.parametrize(
    "named",
    ["../../etc/passwd", "/etc/passwd", "a/../../b.safetensors", "", "a\0b", 5, None, ["a"], "gone.safetensors"],
)
def test_an_index_that_leads_elsewhere(named: Any, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "b.safetensors")
    names = load_file(copy.parent / "b.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
    with pytest.raises(ValueError, match=r"it must lie in this directory|cannot be read|not a regular file") as caught:
        check_model(str(copy), EngineConfig())
    assert str(copy) in str(caught.value) and "root:" not in str(caught.value)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_no_numbers(name: str, number: float, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[3] = number
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} holds numbers that are not finite") as caught:
        LLM(str(copy), kv_tokens=2048)
    assert "\n" not in str(caught.value)


def test_weights_too_large_for_the_dtype_that_is_asked_for(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    LLM(str(copy), kv_tokens=2048, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"norm\.weight holds numbers that are not finite, read as torch\.float16"):
        LLM(str(copy), kv_tokens=2048, dtype="float16")


def huge(directory: Path, files: int) -> Path:
    """A model of which only headers exist, in sparse files: a terabyte."""
    spec = ModelSpec(vocab_size=1 << 17, hidden_size=1 << 14, intermediate_size=1 << 16, num_layers=128, num_heads=128,
                     num_kv_heads=8, head_dim=128, max_position=1024, dtype=torch.bfloat16)  # fmt: skip
    (directory / "config.json").write_text(json.dumps(spec.to_config()))
    (directory / "model.safetensors").unlink()
    with torch.device("meta"):
        pieces = [piece for parameter in sharded_parameters(Transformer(spec)) for piece in parameter.pieces]
    for number in range(files):
        header: dict[str, Any] = {}
        end = 0
        for piece in pieces[number::files]:
            begin, end = end, end + 2 * math.prod(piece.shape)
            header[piece.name] = {"dtype": "BF16", "shape": piece.shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (directory / f"{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    return directory


def test_a_model_that_cannot_fit_says_what_it_needs(copy: Path) -> None:
    huge(copy, 128)
    with pytest.raises(ValueError, match=r"weights of one rank need [\d.]+ GiB in bfloat16, but [\d.]+ GiB of memory"):
        LLM(str(copy), device="cpu")


def test_one_file_larger_than_memory_is_a_sentence(copy: Path) -> None:
    """Mapping it fails; what is needed is said first."""
    huge(copy, 1)
    with pytest.raises(ValueError, match="weights of one rank need"):
        LLM(str(copy), device="cpu")
    try:
        check_weights(ModelSpec.load(copy), copy)
    except ValueError as error:
        assert "0.safetensors cannot be read" in str(error)


def test_ranks_of_one_machine_count_together(copy: Path) -> None:
    """Each by itself would fit."""
    spec = ModelSpec.load(huge(copy, 128))
    check_weights(spec, copy)
    with pytest.raises(ValueError) as caught:
        check_memory(spec, "cpu", Shard(0, 8), ranks_here=8)
    assert "the weights of 8 ranks need" in str(caught.value)
    small = ModelSpec(vocab_size=1024, hidden_size=1 << 10, intermediate_size=1 << 10, num_layers=1, num_heads=8,
                      num_kv_heads=8, head_dim=128, max_position=8)  # fmt: skip
    check_memory(small, "cpu", ranks_here=1)
    with pytest.raises(ValueError, match="ranks need"):
        check_memory(small, "cpu", ranks_here=available() // 1024**2)  # some megabytes each


def test_the_driver_asks_before_anything_is_started(copy: Path) -> None:
    def ask(path: Path | str, *words: str) -> None:
        check_here(deployment_of(composed("serve", f"model={{path: '{path}', name: m}}", *words)))

    ask(copy)
    ask(copy / "nowhere")  # other machines may have it
    with pytest.raises(ValueError, match="max_model_len is 2048, but the model was made for 1024 tokens"):
        ask(copy, "engine.max_model_len=2048")
    put(copy, "config.json", "num_hidden_layers", "true")
    with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers is True; it must be a positive integer"):
        ask(copy)
