"""GGUF files against `transformers`: its own loading of the same file, and the checkpoint that the file was made of."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoTokenizer

from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.generation_defaults import GenerationDefaults
from stepladder.parallel.gguf import directory as gguf_directory
from stepladder.parallel.gguf.directory import write_directory
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.text.tokenizer import Tokenizer
from tests.families import LLAMA3, read_oracle
from tests.gguf_files import (
    ARCHS,
    F32,
    Q8_0,
    byte_level,
    floats,
    read_gguf_oracle,
    sentence_piece,
    write_checkpoint,
    write_gguf,
)

TOKENS = torch.randint(0, 270, (1, 60), generator=torch.Generator().manual_seed(5))
TEXTS = [
    "hello world",
    "hello  world's end.\n\n  Hello",
    "naïve café 日本語 😀 don't",
    "x <think>hello</think><|im_end|> world",
    "",
]


@torch.inference_mode()
def logits(directory: Path) -> Tensor:
    model = Transformer(ModelSpec.load(directory)).requires_grad_(False)
    load_weights(model, directory)
    return model.logits(model(TOKENS.view(-1), WholeSequences(1, TOKENS.numel())))


def converted(path: Path, dtype: str | None = None) -> Path:
    directory = path.with_suffix(".hf")
    directory.mkdir()
    write_directory(path, directory, dtype)
    return directory


@torch.inference_mode()
def theirs(path: Path) -> Tensor:
    return read_gguf_oracle(path)(TOKENS).logits[0]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", [F32, Kind.F16, Kind.BF16, Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("family", ARCHS)
def test_logits_equal_transformers_own_loading(family: str, kind: Kind, tmp_path: Path) -> None:
    fields = {"tie_word_embeddings": True, "head_dim": 128} if family == "qwen3" else {}  # the only one it assumes
    path = write_gguf(tmp_path / "tiny.gguf", write_checkpoint(tmp_path, family, **fields), kind)
    close(logits(converted(path, "float32")), theirs(path))


@pytest.mark.parametrize("family", ARCHS)
def test_a_file_in_fp32_is_the_checkpoint_it_was_made_of(family: str, tmp_path: Path) -> None:
    """Biases of query and key are rows too, in llama.cpp's order."""
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    checkpoint = write_checkpoint(tmp_path, family, **biases)
    found = converted(write_gguf(tmp_path / "tiny.gguf", checkpoint))
    spec, original = ModelSpec.load(found), ModelSpec.load(checkpoint)
    for name in ("num_kv_heads", "head_dim", "rope_theta", "norm_eps", "qkv_bias", "mlp_bias", "qk_norm", "dtype"):
        assert getattr(spec, name) == getattr(original, name), name
    assert torch.equal(logits(found), logits(checkpoint))
    close(read_oracle(found)(TOKENS).logits[0].detach(), read_oracle(checkpoint)(TOKENS).logits[0].detach())


@pytest.mark.parametrize("family", ARCHS)
def test_metadata_that_may_be_left_out(family: str, tmp_path: Path) -> None:
    keys = ["attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"]
    checkpoint = write_checkpoint(tmp_path, family, num_key_value_heads=4, rope_parameters={"rope_theta": 10000.0})
    keys += ["attention.head_count_kv", "rope.freq_base"]
    found = converted(write_gguf(tmp_path / "tiny.gguf", checkpoint, without=[f"{{}}.{key}" for key in keys]))
    assert torch.equal(logits(found), logits(checkpoint))


def test_a_window_of_mistral(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "mistral", sliding_window=7)
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint, fields={"{}.attention.sliding_window": 7})
    found = converted(path)
    assert ModelSpec.load(found).family == "mistral"
    assert torch.equal(logits(found), logits(checkpoint))


STRETCHED = LLAMA3 | {"original_max_position_embeddings": 128, "high_freq_factor": 16.0}


def llama3_factors(head_dim: int) -> list[float]:
    """What llama.cpp's converter keeps of Llama 3's scaling: each frequency is divided by one (2407.21783 §3.4.2)."""
    found = []
    names = "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
    original, low, high = (STRETCHED[name] for name in names)
    for i in range(0, head_dim, 2):
        turns = original / (2 * math.pi * STRETCHED["rope_theta"] ** (i / head_dim))
        smooth = (turns - low) / (high - low)
        stretched = 1 / ((1 - smooth) / STRETCHED["factor"] + smooth)
        found.append(1.0 if turns > high else STRETCHED["factor"] if turns < low else stretched)
    return found


def test_rope_factors_of_llama_3(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama", rope_parameters=STRETCHED)
    tensors = {"rope_freqs.weight": floats(llama3_factors(16))}
    found = converted(write_gguf(tmp_path / "tiny.gguf", checkpoint, tensors=tensors))
    assert len(set(llama3_factors(16))) > 3, "fast, slow and between"
    close(logits(found), read_oracle(checkpoint)(TOKENS).logits[0].detach())
    close(read_oracle(found)(TOKENS).logits[0].detach(), logits(found))


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"{}.rope.scaling.type": "linear", "{}.rope.scaling.factor": 4.0},
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"{}.rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "{}.rope.scaling.type": "yarn",
                "{}.rope.scaling.factor": 4.0,
                "{}.rope.scaling.original_context_length": 64,
            },
        ),
    ],
    ids=["linear", "old-linear", "yarn"],
)
def test_rope_scaling(rope: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen2", rope_parameters={"rope_theta": 5000.0, **rope})
    found = converted(write_gguf(tmp_path / "tiny.gguf", checkpoint, fields=fields))
    assert ModelSpec.load(found).rope_scaling == ModelSpec.load(checkpoint).rope_scaling
    close(logits(found), read_oracle(checkpoint)(TOKENS).logits[0].detach())


def test_long_and_short_rope_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "long_factor": [1.0 + i for i in range(8)],
        "short_factor": [1.0 + i / 4 for i in range(8)],
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    }
    checkpoint = write_checkpoint(tmp_path, "llama", rope_parameters=rope)
    tensors = {f"rope_factors_{n}.weight": floats(rope[f"{n}_factor"]) for n in ("long", "short")}
    fields = {"{}.rope.scaling.original_context_length": 64, "{}.rope.scaling.attn_factor": 1.25}
    found = ModelSpec.load(converted(write_gguf(tmp_path / "t.gguf", checkpoint, fields=fields, tensors=tensors)))
    want = ModelSpec.load(checkpoint).rope_scaling
    assert found.rope_scaling and want
    assert found.rope_scaling.within(64).factors == want.within(64).factors == tuple(rope["short_factor"])
    assert (found.rope_scaling.factors, found.rope_scaling.attention_factor) == (want.factors, 1.25)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_byte_level_tokens_equal_transformers(pre: str, llama: Path, tmp_path: Path) -> None:
    """Digits are left out: `transformers` does not know that SmolLM's tokens hold one each, as llama.cpp does."""
    path = write_gguf(tmp_path / "tiny.gguf", llama, tokenizer=byte_level(pre))
    mine, oracle = Tokenizer(converted(path)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert mine.encode(text) == oracle.encode(text), text
        assert mine.decode(mine.encode(text), skip_special=False) == text
    assert mine.encode("hello") == [259], "it can fail"


@pytest.mark.parametrize(("pre", "count"), [("smollm", 2), ("gpt-2", 1), ("qwen2", 2), ("llama-bpe", 1)])
def test_digits_are_cut_as_the_model_has_learnt(pre: str, count: int, llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, tokenizer=byte_level(pre))
    assert len(Tokenizer(converted(path)).encode("12")) == count


def test_sentence_piece_tokens_equal_transformers(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, tokenizer=sentence_piece())
    mine, oracle = Tokenizer(converted(path)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("hello world.", "hello  wello\n日本 é", "the world</s>"):
        assert mine.encode(text) == oracle.encode(text), text
        assert mine.decode(mine.encode(text)[1:]) == text.removesuffix("</s>")
    assert mine.encode("hello world")[0] == 1 and len(mine.encode("hello world")) == 3, "BOS, and two words"


def test_what_the_metadata_says_of_the_ends_of_a_text(llama: Path, tmp_path: Path) -> None:
    keys = {"ggml.add_bos_token": True, "ggml.add_eos_token": True, "ggml.eot_token_id": 7, "ggml.eom_token_id": 8}
    tokenizer = byte_level(**keys)
    tokens = tokenizer["ggml.tokens"]
    bos, eos = tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")
    found = converted(write_gguf(tmp_path / "tiny.gguf", llama, tokenizer=tokenizer))
    assert ModelSpec.load(found).eos_ids == (eos, 7, 8, bos), "<|endoftext|> as llama.cpp, by its spelling"
    assert Tokenizer(found).encode("h") == [bos, tokens.index("h"), eos]


def test_rows_that_no_text_has_are_no_tokens(llama: Path, tmp_path: Path) -> None:
    mine = Tokenizer(converted(write_gguf(tmp_path / "tiny.gguf", llama)))
    tokens = byte_level()["ggml.tokens"]
    assert tokens[287] == "[PAD287]" and not mine.knows(287) and mine.knows(tokens.index("<think>"))


def test_chat_template_and_recommended_sampling(llama: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    fields = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95}
    path = write_gguf(tmp_path / "t.gguf", llama, tokenizer=byte_level(**{"chat_template": template}), fields=fields)
    found = converted(path)
    assert Tokenizer(found).chat([{"role": "user", "content": "hello"}]) == "hello<|im_end|>\n"
    assert GenerationDefaults.load(found).sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.parametrize(
    ("kind", "asked", "dtype"),
    [
        (F32, None, torch.float32),
        (Kind.F16, None, torch.float16),
        (Kind.BF16, None, torch.bfloat16),
        (Q8_0, None, torch.float32),
        (Q8_0, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype(
    kind: Kind, asked: str | None, dtype: torch.dtype, llama: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = write_gguf(tmp_path / "tiny.gguf", llama, kind)
    with caplog.at_level("INFO"):
        found = converted(path, asked)
    assert ModelSpec.load(found).dtype == dtype
    assert f"tiny.gguf: its weights take 0.00 GB as {str(dtype).removeprefix('torch.')}" in caplog.text


def test_weights_of_several_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_directory, "FILE_BYTES", 50_000)
    found = converted(write_gguf(tmp_path / "tiny.gguf", llama))
    assert len(list(found.glob("*.safetensors"))) > 2
    assert torch.equal(logits(found), logits(llama))
    close(read_oracle(found)(TOKENS).logits[0].detach(), logits(llama))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fields": {"general.architecture": "gemma3"}}, r"general\.architecture is 'gemma3'; this version serves"),
        ({"without": ["{}.block_count"]}, r"lacks the field 'llama\.block_count'"),
        ({"fields": {"{}.block_count": 0}}, r"llama\.block_count is 0; it must be a positive integer"),
        ({"fields": {"{}.context_length": "long"}}, r"llama\.context_length is 'long'; it must be"),
        ({"fields": {"{}.expert_count": 8}}, r"llama\.expert_count is 8; only 0 is supported"),
        ({"fields": {"{}.attention.head_count_kv": [2, 2, 1]}}, "only layers that are all alike"),
        ({"fields": {"{}.rope.dimension_count": 8}}, "all three must be equal"),
        ({"fields": {"{}.rope.scaling.type": "su", "{}.rope.scaling.factor": 2.0}}, "must be none, linear or yarn"),
        ({"fields": {"split.count": 3}}, "is one of 3 parts"),
        ({"without": ["tokenizer.ggml.tokens"]}, r"lacks the field 'tokenizer\.ggml\.tokens'"),
        ({"without": ["tokenizer.ggml.merges"]}, r"lacks the field 'tokenizer\.ggml\.merges'"),
        ({"tokenizer": byte_level("gigachat")}, r"tokenizer\.ggml\.pre is 'gigachat'; this version knows"),
        ({"tokenizer": byte_level(**{"ggml.model": "t5"})}, r"tokenizer\.ggml\.model is 't5'"),
        ({"tokenizer": byte_level(**{"ggml.merges": ["h e", "hex"]})}, r"tokenizer\.ggml\.merges has 'hex'"),
        ({"tokenizer": byte_level(**{"ggml.merges": ["h zz"]})}, r"tokenizer\.ggml\.\* is no tokenizer"),
        ({"tokenizer": byte_level(**{"ggml.eos_token_id": 288})}, r"eos_token_id is 288; it must be"),
        ({"tokenizer": byte_level(**{"ggml.token_type": [1]})}, "has 1 entries for 288 tokens"),
        ({"tokenizer": byte_level(size=300, **{"ggml.token_type": [1] * 300})}, "300 tokens, but embeddings of 288"),
        ({"tokenizer": sentence_piece(**{"ggml.scores": [0.0]})}, r"scores has 1 entries"),
        ({"without": ["blk.1.ffn_up.weight"]}, r"no tensor blk\.1\.ffn_up\.weight"),
        ({"without": ["token_embd.weight"]}, r"no tensor token_embd\.weight"),
        ({"tensors": {"blk.0.attn_sinks.weight": floats([1.0])}}, r"has the tensor blk\.0\.attn_sinks\.weight"),
        ({"fields": {"{}.feed_forward_length": 64}}, r"blk\.0\.ffn_gate\.weight has shape \(96, 64\)"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_served_is_one_sentence(
    changes: dict[str, Any], sentence: str, llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, **changes)
    with pytest.raises(ValueError, match=sentence) as error:
        converted(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_gguf_cannot_undo(llama: Path, tmp_path: Path) -> None:
    """As Q8_K, which is for intermediate results only."""
    path = write_gguf(tmp_path / "tiny.gguf", llama, Kind.F16)
    name, kinds = b"blk.0.ffn_up.weight", (Kind.F16, Kind.I16)
    data = path.read_bytes()
    at = data.index(name) + len(name) + 4 + 2 * 8  # two dimensions of 8 bytes behind their count
    assert data[at : at + 4] == int(kinds[0]).to_bytes(4, "little")
    path.write_bytes(data[:at] + int(kinds[1]).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight is quantised as I16, which cannot be undone"):
        converted(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0" + bytes(64), bytes(500)])
def test_what_is_no_gguf_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.gguf is (not a GGUF file|cut off, broken or of another version)"):
        converted(path)


def test_any_damage_is_one_sentence_or_none(llama: Path, tmp_path: Path) -> None:
    """Cut anywhere, it is refused; with bytes changed, it may be another file, but nothing else is raised."""
    data = write_gguf(tmp_path / "tiny.gguf", llama, Q8_0).read_bytes()
    path, directory, chance = tmp_path / "bad.gguf", tmp_path / "empty", random.Random(0)
    directory.mkdir()
    for index in range(60):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[chance.randrange(9000)] = chance.randrange(256)
        path.write_bytes(data[: chance.randrange(len(data) - 40)] if index % 2 else damaged)
        try:
            write_directory(path, directory)
        except ValueError as error:
            assert str(path) in str(error) or str(directory) in str(error)
        else:
            assert index % 2 == 0, "a part of a file was taken for the whole"


def test_the_directory_is_hugging_faces(llama: Path, tmp_path: Path) -> None:
    """`transformers` loads it, tokenizer and template too."""
    path = write_gguf(tmp_path / "t.gguf", llama, tokenizer=byte_level(chat_template="{{ messages[0].content }}!"))
    found = converted(path)
    tokenizer = AutoTokenizer.from_pretrained(found)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.encode("hello") == [259]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello!"
    assert json.loads((found / "config.json").read_text())["model_type"] == "llama"
