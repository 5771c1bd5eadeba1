"""What model a GGUF file holds: `ModelSpec` from its metadata, and what its tensors are called."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from stepladder.kernels.rope import RopeScaling
from stepladder.parallel.config_fields import FACTOR, FIELDS, LONGEST
from stepladder.parallel.families import DTYPES
from stepladder.parallel.gguf.reader import REQUIRED, GgufFile
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import TEXT, either, number, several, shown, whole

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # llama.cpp's name -> ours; a Llama may be a Mistral
ROTATED = ("llama",)  # of these llama.cpp keeps the rows of query and key in another order
NAMES = {  # a tensor -> what it is for, a key of the family's names; {} is the layer's number
    "token_embd": "embedding",
    "output_norm": "norm",
    "output": "head",
    "blk.{}.attn_norm": "attention.norm",
    "blk.{}.attn_q": "attention.q",
    "blk.{}.attn_k": "attention.k",
    "blk.{}.attn_v": "attention.v",
    "blk.{}.attn_q_norm": "attention.q_norm",
    "blk.{}.attn_k_norm": "attention.k_norm",
    "blk.{}.attn_output": "attention.out",
    "blk.{}.ffn_norm": "ffn.norm",
    "blk.{}.ffn_gate": "ffn.gate",
    "blk.{}.ffn_up": "ffn.up",
    "blk.{}.ffn_down": "ffn.down",
}
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ELSEWHERE = {ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS}  # part of the configuration
UNUSED = ".attn_rot_embd"  # what is computed from the metadata; old files carry it along

# Fields that change the mathematics, and the values that leave it as it is.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def spec_of(file: GgufFile, dtype: str | None, eos_ids: tuple[int, ...]) -> ModelSpec:
    """The model of a file; the values must fit, as those of a `config.json`.

    Args:
        dtype: of the weights once they are dequantised; None takes what loses nothing.

    Raises:
        ValueError, KeyError: a field is missing, or asks for something this engine does not do.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {shown(dtype)}; it must be one of {', '.join(DTYPES)}, or null")
    if file.architecture not in FAMILIES:
        raise ValueError(
            f"general.architecture is {shown(file.metadata.get('general.architecture'))}; this version serves GGUF "
            f"files of {', '.join(FAMILIES)} (Mistral's are llama)"
        )
    for name, neutral in NEUTRAL.items():
        value = file.metadata.get(f"{file.architecture}.{name}", neutral[0])
        if value not in neutral:
            raise ValueError(f"{file.architecture}.{name} is {shown(value)}; only {neutral[-1]!r} is supported")
    hidden, layers = _size(file, "embedding_length", "hidden_size"), _size(file, "block_count", "num_hidden_layers")
    heads = _size(file, "attention.head_count", "num_attention_heads")
    window = _size(file, "attention.sliding_window", "sliding_window", None) if file.architecture == "llama" else None
    return ModelSpec(
        family="mistral" if window else FAMILIES[file.architecture],
        vocab_size=_rows(file, "token_embd.weight"),
        hidden_size=hidden,
        intermediate_size=_size(file, "feed_forward_length", "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_size(file, "attention.head_count_kv", "num_key_value_heads", heads),
        head_dim=_head_dim(file, heads),
        max_position=_size(file, "context_length", "max_position_embeddings"),
        windows=(window,) * layers if window else (),
        rope_theta=file.field("rope.freq_base", FIELDS["rope_theta"], 10000.0),
        rope_scaling=_rope_scaling(file),
        norm_eps=file.field("attention.layer_norm_rms_epsilon", FIELDS["rms_norm_eps"]),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="shared" if file.architecture == "qwen3" else "none",
        tie_embeddings="output.weight" not in file.tensors,
        dtype=DTYPES[dtype or file.dtype_name()],
        eos_ids=eos_ids,
    )


def tensor_names(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """(the name in a GGUF file, the name in a Hugging Face directory) of all that such a model may have."""
    for name, what in NAMES.items():
        if what != "head" or not spec.tie_embeddings:
            for layer in range(spec.num_layers if "{}" in name else 1):
                for part in ("weight", "bias"):
                    yield f"{name.format(layer)}.{part}", spec.tensor(what, layer, part)


def _size(file: GgufFile, name: str, ours: str, default: Any = REQUIRED) -> Any:
    """A field in the range of the field of a `config.json`; one value per layer must be the same one for all."""
    found = file.field(name, either(FIELDS[ours], several(FIELDS[ours])), default)
    if not isinstance(found, tuple):
        return found
    if len(set(found)) != 1:
        raise ValueError(f"{file.architecture}.{name} is {shown(found)}; only layers that are all alike are supported")
    return found[0]


def _head_dim(file: GgufFile, heads: int) -> int:
    """Where the metadata is silent, what the query's rows are cut into."""
    dims = {
        name: _size(file, name, "head_dim", None)
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    given = {dim for dim in dims.values() if dim is not None}
    if len(given) > 1:
        raise ValueError(f"{file.architecture}: {shown(dims)}; all three must be equal to be supported")
    return given.pop() if given else _rows(file, "blk.0.attn_q.weight") // heads


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise ValueError(f"there is no tensor {name}")
    return file.shape(name)[0]


def _rope_scaling(file: GgufFile) -> RopeScaling | None:
    """A factor per frequency, which is how llama.cpp keeps Llama 3's and Phi's scaling, or one for all."""
    longest = _size(file, "context_length", "max_position_embeddings")
    original = file.field("rope.scaling.original_context_length", whole(1, LONGEST), longest)
    attention = file.field("rope.scaling.attn_factor", FACTOR, 1.0)
    if ROPE_FACTORS in file.tensors:
        return _by_frequency(file, ROPE_FACTORS, ROPE_FACTORS, longest, attention)
    if LONG_FACTORS in file.tensors and SHORT_FACTORS in file.tensors:
        return _by_frequency(file, LONG_FACTORS, SHORT_FACTORS, original, attention)
    # an old name of the factor had no kind beside it, and was linear
    old = file.field("rope.scale_linear", number(0), 0.0)
    factor = file.field("rope.scaling.factor", number(0), old)
    kind = file.field("rope.scaling.type", TEXT, "linear" if factor else "none")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        return _yarn(file, factor, original, attention)
    raise ValueError(f"{file.architecture}.rope.scaling.type is {shown(kind)}; it must be none, linear or yarn here")


def _by_frequency(file: GgufFile, long: str, short: str, original: int, attention: float) -> RopeScaling:
    factors, short_factors = (tuple(file.numbers(name).ravel().tolist()) for name in (long, short))
    return RopeScaling(
        kind="longrope",
        factors=factors,
        short_factors=short_factors,
        original_positions=original,
        attention_factor=attention,
    )


def _yarn(file: GgufFile, factor: float, original: int, attention: float) -> RopeScaling:
    """Peng et al. 2309.00071; llama.cpp multiplies what its equation 22 gives by a factor of the file."""
    beta_fast, beta_slow = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
    return RopeScaling(
        kind="yarn",
        factor=factor,
        low=file.field(beta_slow, FACTOR, 1.0),
        high=file.field(beta_fast, FACTOR, 32.0),
        original_positions=original,
        attention_factor=attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
    )
