"""The rope fields of a `config.json`, in the spellings of transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any

from stepladder.kernels.rope import RopeScaling

Config = Mapping[str, Any]
ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def rope_parameters(config: Config) -> Mapping[str, Any]:
    """The rope fields as one mapping: `rope_parameters` in transformers 5, `rope_scaling` before."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def read_rope(config: Config) -> dict[str, Any]:
    rope = rope_parameters(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type is {kind!r}; this version does {', '.join(ROPE_FIELDS)}")
    for field in rope:
        if field not in ROPE_COMMON | ROPE_FIELDS[kind] and rope[field] is not None:
            raise ValueError(f"rope_parameters has {field!r}, which is not supported with rope_type {kind!r}")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported")
    for field in ROPE_FIELDS[kind]:
        if rope.get(field) is None:
            raise ValueError(f"rope_parameters lacks {field!r}, which rope_type {kind!r} needs")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return {"rope_theta": theta, "rope_scaling": _scaling(config, rope, kind)}


def _scaling(config: Config, rope: Mapping[str, Any], kind: str) -> RopeScaling | None:
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        field = "original_max_position_embeddings"
        return RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low=float(rope["low_freq_factor"]),
            high=float(rope["high_freq_factor"]),
            original_positions=config.get(field) or rope.get(field) or config["max_position_embeddings"],
        )
    return None


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """What `read_rope` reads back."""
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_positions,
    }
