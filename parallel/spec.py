"""What a checkpoint is: its shapes, its variations on the Llama decoder, and its residual wiring."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepladder.kernels.rope import RopeScaling
from stepladder.parallel.config_fields import FIELDS
from stepladder.parallel.experts import ExpertSpec
from stepladder.parallel.families import DTYPES, FAMILIES, dtype_name, fields_of, identity
from stepladder.parallel.generation_defaults import GENERATION_CONFIG, GenerationDefaults
from stepladder.parallel.rope_config import write_scaling
from stepladder.parallel.special_tokens import end_of_turn
from stepladder.parallel.typed_json import naming, read_object, typed
from stepladder.parallel.weight_files import WeightFiles

CHOICES = {
    "residual": ("standard", "ladder", "parallel", "ladder-parallel"),
    "norm": ("rms", "layer"),
    "qk_norm": ("none", "shared", "per-head"),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes of a decoder, how it differs from Llama, and how its blocks read the residual stream.

    `residual` and `ladder_layers` belong to the checkpoint, never to a deployment: the same weights under another
    wiring are another model (and their KV caches must never mix).

    Attributes:
        family: the `model_type` whose names its configuration and its tensors have.
        windows: for each layer, how many positions up to its own a query sees, or None for all; () for no windows.
        qkv_bias, out_bias, mlp_bias: linear layers with a bias: query, key and value; attention output; all of the FFN.
        norm: RMSNorm, or LayerNorm without bias.
        qk_norm: `shared` norms each head of query and key with one weight [head_dim], `per-head` with a weight for
            every head [heads, head_dim].
        rope_interleaved: dimensions 2i and 2i + 1 turn together, not i and i + head_dim / 2.
        query_rank: the inner size of queries that come in two steps (`modules.FactoredAttention`); 0 if they do not.
        experts: the mixture of experts that layers have in place of one feed-forward network.
        logit_scale: the logits are multiplied by it.
        eos_ids: tokens that end a sequence.
    """

    family: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    windows: tuple[int | None, ...] = ()
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    query_rank: int = 0
    experts: ExpertSpec | None = None
    logit_scale: float = 1.0
    tie_embeddings: bool = False
    residual: str = "standard"
    ladder_layers: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _positive(name, getattr(self, name))
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; this version serves {', '.join(sorted(FAMILIES))}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        self._check_layers()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        for name in ("norm_eps", "logit_scale"):
            if not isinstance(getattr(self, name), int | float) or not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a positive number")

        for token in self.eos_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"eos_token_id is {token}; the vocabulary has the ids 0 to {self.vocab_size - 1}")
        scaling = self.rope_scaling
        wanted = {self.head_dim // 2 if scaling and scaling.kind == "longrope" else 0}
        if scaling and {len(scaling.factors), len(scaling.short_factors)} != wanted:
            raise ValueError(
                f"long_factor and short_factor have {len(scaling.factors)} and {len(scaling.short_factors)} entries; a "
                f"head_dim of {self.head_dim} needs {self.head_dim // 2}"
            )

    def _check_layers(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries, but the model has {self.num_layers} layers")
        if self.experts and not set(self.experts.layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"experts are in layer {max(self.experts.layers)}, but the model has layers 0..{self.num_layers - 1}"
            )
        for window in self.windows:
            if window is not None:
                _positive("sliding_window", window)
        if self.ladder_layers is not None and not self.residual.startswith("ladder"):
            raise ValueError(f"ladder_layers needs residual: ladder or ladder-parallel, not {self.residual!r}")
        for layer in self.ladder_layers or ():
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"ladder_layers names layer {layer}, but the model has layers 0..{self.num_layers - 1}"
                )

    @property
    def longest(self) -> int:
        """The longest context that may be asked for: what the rope was stretched to, where `max_position` is the length
        from before, as configurations of linear and YaRN scaling may have it."""
        scaling = self.rope_scaling
        stretched = {"linear": self.max_position, "yarn": scaling.original_positions if scaling else 0}
        if scaling is None or scaling.kind not in stretched:
            return self.max_position
        return max(self.max_position, int(stretched[scaling.kind] * scaling.factor))

    @property
    def wiring_key(self) -> str:
        """Names the wiring, so that caches of two wirings of the same weights never meet."""
        return f"{self.residual}:{self.ladder_layers}"

    def tensor(self, what: str, layer: int = 0, part: str = "weight", expert: int = 0) -> str:
        """The name in the checkpoint of a tensor; `what` is a key of the family's names, `part` "weight" or "bias"."""
        return f"{FAMILIES[self.family].names[what].format(layer, expert)}.{part}"

    @property
    def stacked_experts(self) -> bool:
        """Whether the checkpoint has one tensor [experts, ...] for all that are alike, not one for each."""
        return FAMILIES[self.family].stacked_experts

    def is_ladder(self, layer: int) -> bool:
        """Whether this layer's blocks read a stream that is one block stale."""
        return self.residual.startswith("ladder") and (self.ladder_layers is None or layer in self.ladder_layers)

    def window(self, layer: int) -> int | None:
        """How many positions, its own included, a query of this layer sees; None for all."""
        return self.windows[layer] if self.windows else None

    @classmethod
    def load(cls, directory: str | Path) -> "ModelSpec":
        """Read `config.json` of a Hugging Face model directory; `generation_config.json` may overrule its EOS ids, and
        the tokenizer's own is always one of them; without a dtype the weights' own is taken.

        Raises:
            ValueError: the file is missing or not JSON, or a field asks for something this engine does not do.
        """
        path = Path(directory) / "config.json"
        try:
            config = read_object(path)
        except FileNotFoundError:
            raise ValueError(
                f"{path} does not exist; model.path must be a Hugging Face model directory or a GGUF file"
            ) from None
        eos_ids = GenerationDefaults.load(directory).eos_ids
        with naming(path):
            config = typed(config, FIELDS)
            if dtype_name(config) is None:
                config |= {"dtype": WeightFiles(directory).dtype_name()}
            spec = cls.from_config(config)
        with naming(path.with_name(GENERATION_CONFIG)):
            spec = spec if eos_ids is None else replace(spec, eos_ids=eos_ids)
        return replace(spec, eos_ids=_with_end_of_turn(spec, directory))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Build from the fields of a `config.json`; both spellings of the rope fields (v4, v5) are read."""
        return cls(**fields_of(config))

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that `from_config` reads back to an equal spec; `transformers` loads it as this family, or
        with `trust_remote_code` if the wiring is not the family's own.

        Raises:
            ValueError: the family's configuration cannot describe this model.
        """
        family = FAMILIES[self.family]
        config: dict[str, Any] = {
            **identity(self.family, self.residual),
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
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype),
            "eos_token_id": list(self.eos_ids) or None,
            "residual": self.residual,
        } | family.write(self)
        if self.ladder_layers is not None:
            config["ladder_layers"] = list(self.ladder_layers)
        if self.rope_scaling is not None:
            config["rope_scaling"] = write_scaling(self.rope_scaling)
        if ModelSpec.from_config(config) != self:
            raise ValueError(f"this model cannot be written: the configuration of {self.family!r} cannot describe it")
        return config


def _with_end_of_turn(spec: ModelSpec, directory: str | Path) -> tuple[int, ...]:
    token = end_of_turn(directory)
    is_new = token is not None and token not in spec.eos_ids and token < spec.vocab_size
    return (*spec.eos_ids, token) if token is not None and is_new else spec.eos_ids


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
