"""What a checkpoint is: its shapes and its residual wiring, read from a Hugging Face `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESIDUALS = ("standard", "ladder", "parallel", "ladder-parallel")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes of a Llama-family model and how its blocks read the residual stream.

    `residual` and `ladder_layers` belong to the checkpoint, never to a deployment: the same weights under another
    wiring are another model (and their KV caches must never mix).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    residual: str = "standard"
    ladder_layers: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a positive integer")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual is {self.residual!r}; it must be one of {', '.join(RESIDUALS)}")
        if self.ladder_layers is not None and not self.residual.startswith("ladder"):
            raise ValueError(f"ladder_layers needs residual: ladder or ladder-parallel, not {self.residual!r}")
        for layer in self.ladder_layers or ():
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"ladder_layers names layer {layer}, but the model has layers 0..{self.num_layers - 1}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )

    @property
    def wiring_key(self) -> str:
        """Names the wiring, so that caches of two wirings of the same weights never meet."""
        return f"{self.residual}:{self.ladder_layers}"

    def is_ladder(self, layer: int) -> bool:
        """Whether this layer's blocks read a stream that is one block stale."""
        return self.residual.startswith("ladder") and (self.ladder_layers is None or layer in self.ladder_layers)

    @classmethod
    def load(cls, directory: str | Path) -> "ModelSpec":
        """Read `config.json` of a Hugging Face model directory.

        Raises:
            ValueError: the file is missing or not JSON, or a field asks for something this engine does not do.
        """
        path = Path(directory) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; model.path must be a Hugging Face model directory") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a JSON object; it must be a Hugging Face model configuration")
        try:
            return cls.from_config(config)
        except KeyError as error:
            raise ValueError(f"{path} lacks the field {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Build from the fields of a `config.json`; both spellings of the rope fields (v4, v5) are read."""
        _refuse_unsupported(config)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        rope = config.get("rope_parameters") or {}
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position=config.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=config.get("tie_word_embeddings", False),
            residual=config.get("residual") or "standard",
            ladder_layers=_ladder_layers(config.get("ladder_layers"), config["num_hidden_layers"]),
            dtype=_dtype(config.get("dtype") or config.get("torch_dtype") or "float32"),
            eos_ids=_as_tuple(config.get("eos_token_id")),
        )

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that `from_config` reads back to an equal spec; `transformers` loads it as Llama."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype),
            "eos_token_id": list(self.eos_ids) or None,
            "residual": self.residual,
        }
        if self.ladder_layers is not None:
            config["ladder_layers"] = list(self.ladder_layers)
        return config


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type is {config.get('model_type')!r}; this version serves 'llama' only")
    for field, fine in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(field, fine) != fine:
            raise ValueError(f"{field} is {config[field]!r}; only {fine!r} is supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}; only 'default' is supported")
    if config.get("quantization_config"):
        raise ValueError("quantization_config is set; only unquantised weights are supported")


def _ladder_layers(value: int | list[int] | None, num_layers: int) -> tuple[int, ...] | None:
    """An integer n means the last n layers; a list names them; None means all of them."""
    if isinstance(value, int):
        if not 0 <= value <= num_layers:
            raise ValueError(f"ladder_layers is {value}, but the model has {num_layers} layers")
        return tuple(range(num_layers - value, num_layers))
    return None if value is None else tuple(sorted(value))


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
