"""The rope fields of a `config.json`, in the spellings of transformers 4 and 5."""

import math
from collections.abc import Mapping
from typing import Any

from stepladder.kernels.rope import RopeScaling
from stepladder.parallel.config_fields import ROPE
from stepladder.parallel.typed_json import typed

Config = Mapping[str, Any]
ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS: dict[str, set[str]] = {  # what each kind needs
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
}
ROPE_OPTIONAL: dict[str, set[str]] = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor"},
}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL}
# of checkpoints with code of their own, with the values that change nothing
ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "finetuned": (True, False),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}


def rope_parameters(config: Config) -> Mapping[str, Any]:
    """The rope fields as one mapping: `rope_parameters` in transformers 5, `rope_scaling` before, which may also be the
    name of a kind and nothing else."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get(name) or {}
    return typed({"rope_type": found} if isinstance(found, str) else found, ROPE, f"{name}.")


def read_rope(config: Config) -> dict[str, Any]:
    """The rope arguments of `ModelSpec`."""
    rope = rope_parameters(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type is {kind!r}; this version does {', '.join(ROPE_FIELDS)}")
    for field in rope:
        known = ROPE_COMMON | ROPE_FIELDS[kind] | ROPE_OPTIONAL.get(kind, set())
        neutral = rope[field] is None or rope[field] in ROPE_NEUTRAL.get(field, ())
        if field not in known and not neutral:
            raise ValueError(f"rope_parameters has {field!r}, which is not supported with rope_type {kind!r}")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported")
    for field in ROPE_FIELDS[kind]:
        if rope.get(field) is None:
            raise ValueError(f"rope_parameters lacks {field!r}, which rope_type {kind!r} needs")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else _scaling(config, rope, kind)}


def _scaling(config: Config, rope: Mapping[str, Any], kind: str) -> RopeScaling:
    original = int(config.get(ORIGINAL) or rope.get(ORIGINAL) or config["max_position_embeddings"])
    fields: dict[str, Any] = {"kind": kind, "factor": float(rope.get("factor") or 1.0)}
    if kind == "llama3":
        fields |= {"low": float(rope["low_freq_factor"]), "high": float(rope["high_freq_factor"])}
    if kind == "yarn":
        fields |= {"low": float(rope.get("beta_slow") or 1), "high": float(rope.get("beta_fast") or 32)}
        fields |= {"attention_factor": _yarn_attention(rope), "truncate": rope.get("truncate", True)}
    if kind == "longrope":
        # as vLLM: the engine's longest context decides between the two, so that keys of one cache agree
        stretch = float(rope.get("factor") or config["max_position_embeddings"] / original)
        attention = rope.get("attention_factor") or _longrope_attention(stretch, original)
        fields |= {"factor": stretch, "attention_factor": float(attention)}
        fields |= {"factors": tuple(rope["long_factor"]), "short_factors": tuple(rope["short_factor"])}
    if kind != "linear":
        fields["original_positions"] = original
    return RopeScaling(**fields)


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """Peng et al. 2309.00071, equation 22; with `mscale` and `mscale_all_dim` as DeepSeek has it."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(one) / scale(other) if one and other else scale(1.0)


def _longrope_attention(stretch: float, original: int) -> float:
    """Ding et al. 2402.13753, as Phi-3 has it."""
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """What `read_rope` reads back."""
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields[ORIGINAL] = scaling.original_positions
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        fields |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        fields |= {"long_factor": list(scaling.factors), "short_factor": list(scaling.short_factors)}
    if scaling.kind in ("yarn", "longrope"):
        fields["attention_factor"] = scaling.attention_factor
    return fields
