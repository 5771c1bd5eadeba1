"""GGUF files as llama.cpp writes them, made of small Hugging Face checkpoints by the package `gguf`; and what
`transformers` makes of such files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.families import write_family

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
ARCHS = {"llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
SHAPES: dict[str, Any] = {  # multiples of 32, as quantised rows must be
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}
QWEN = {"use_sliding_window": False, "layer_types": None, "sliding_window": None}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "attention_bias": False, "mlp_bias": False}


def write_checkpoint(directory: Path, family: str, **fields: Any) -> Path:
    """A Hugging Face checkpoint whose GGUF file can say all of it."""
    chosen = {"llama": "llama3"}.get(family, family)
    windows = QWEN if family.startswith("qwen") else {"sliding_window": None}
    return write_family(directory, chosen, gain=2.0, **{**SHAPES, **PLAIN, **windows, **fields})


def write_gguf(
    path: Path,
    checkpoint: Path,
    kind: GGMLQuantizationType = F32,
    tokenizer: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """What llama.cpp makes of a checkpoint.

    Args:
        kind: of matrices; vectors stay in fp32.
        tokenizer: keys behind "tokenizer."; a byte-level one by default.
        fields: further keys, {} in them is the architecture; they overrule others.
        tensors: further ones.
        without: keys and tensors that are left out.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    arch = {"llama": "llama", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    given = {**_model_fields(config), **{f"tokenizer.{k}": v for k, v in (tokenizer or byte_level()).items()}}
    given |= fields or {}
    writer = GGUFWriter(path, arch)
    for key, value in given.items():
        if key not in without:
            _add(writer, key.format(arch), value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = get_tensor_name_map(ARCHS[config["model_type"]], config["num_hidden_layers"])
    found = dict(tensors or {})
    for name, numbers in load_file(checkpoint / "model.safetensors").items():
        for what, count in heads.items() if arch == "llama" else ():
            if f".{what}." in name:
                numbers = _interleaved(numbers, count)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        found[theirs] = numbers
    for name, numbers in found.items():
        if name not in without:
            of = kind if numbers.ndim == 2 else F32
            writer.add_tensor(name, quantize(numbers, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "general.name": "tiny",
        "{}.vocab_size": config["vocab_size"],
        "{}.context_length": config["max_position_embeddings"],
        "{}.embedding_length": config["hidden_size"],
        "{}.block_count": config["num_hidden_layers"],
        "{}.feed_forward_length": config["intermediate_size"],
        "{}.attention.head_count": config["num_attention_heads"],
        "{}.attention.head_count_kv": config["num_key_value_heads"],
        "{}.attention.key_length": config["head_dim"],
        "{}.attention.value_length": config["head_dim"],
        "{}.rope.dimension_count": config["head_dim"],
        "{}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "{}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """As the types that llama.cpp writes."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """How llama.cpp keeps the rows of query and key: 2i and 2i + 1 turn together."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def byte_level(pre: str = "smollm", size: int = 288, **keys: Any) -> dict[str, Any]:
    """256 bytes, some words, then <|im_end|>, <|endoftext|> (control) and <think> (the user's own)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "Ġ Ġ", "' s"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|im_end|>", "<|endoftext|>", "<think>"]
    types = [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED]
    padding = [f"[PAD{index}]" for index in range(len(tokens), size)]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [*tokens, *padding],
        "ggml.token_type": [int(kind) for kind in [*types, *[TokenType.UNUSED] * len(padding)]],
        "ggml.merges": merges,
        "ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "ggml.eos_token_id": tokens.index("<|im_end|>"),
        "ggml.add_bos_token": False,
        **keys,
    }


def sentence_piece(**keys: Any) -> dict[str, Any]:
    """<unk>, <s>, </s>, 256 bytes, letters and some words whose scores say what is joined first."""
    words = ["▁h", "el", "▁hel", "lo", "▁hello", "▁w", "or", "ld", "▁wor", "▁world", "he"]
    letters = ["▁", *"defghlorstuw."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(words) + len(letters))
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens[:288],
        "ggml.token_type": [int(kind) for kind in kinds][:288],
        "ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(tokens) - 259)][: 288 - 259],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **keys,
    }


def floats(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def read_gguf_oracle(path: Path) -> PreTrainedModel:
    """`from_pretrained(gguf_file=...)` without the package `accelerate`, which that asks for and does not need here."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model.eval()
