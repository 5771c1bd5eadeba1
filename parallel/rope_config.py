"""The rope fields of a `config.json`, in the spellings of transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any

from stepladder.kernels.rope import RopeScaling

Config = Mapping[str, Any]
ROPE_FIELDS: dict[str, dict[str, str]] = {  # of each rope_type: its fields, and what `RopeScaling` calls them
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high"},
}
ORIGINAL = "original_max_position_embeddings"
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL}


def rope_parameters(config: Config) -> Mapping[str, Any]:
    """The rope fields as one mapping: `rope_parameters` in transformers 5, `rope_scaling` before."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def read_rope(config: Config) -> dict[str, Any]:
    rope = rope_parameters(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type is {kind!r}; this version does {', '.join(ROPE_FIELDS)}")
    for field in rope:
        if field not in ROPE_COMMON | ROPE_FIELDS[kind].keys() and rope[field] is not None:
            raise ValueError(f"rope_parameters has {field!r}, which is not supported with rope_type {kind!r}")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported")
    for field in ROPE_FIELDS[kind]:
        if rope.get(field) is None:
            raise ValueError(f"rope_parameters lacks {field!r}, which rope_type {kind!r} needs")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return {"rope_theta": theta, "rope_scaling": _scaling(config, rope, kind)}


def _scaling(config: Config, rope: Mapping[str, Any], kind: Any) -> RopeScaling | None:
    if kind == "default":
        return None
    values: dict[str, Any] = {name: float(rope[field]) for field, name in ROPE_FIELDS[kind].items()}
    if kind == "llama3":
        values["original_positions"] = config.get(ORIGINAL) or rope.get(ORIGINAL) or config["max_position_embeddings"]
    return RopeScaling(kind=kind, **values)


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """What `read_rope` reads back."""
    fields = {field: getattr(scaling, name) for field, name in ROPE_FIELDS[scaling.kind].items()}
    original = {ORIGINAL: scaling.original_positions} if scaling.kind == "llama3" else {}
    return {"rope_type": scaling.kind, **fields, **original}
