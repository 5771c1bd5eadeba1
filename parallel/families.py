"""What a family of models calls things, its fields in a Hugging Face `config.json` and its tensors: the one such place.

A family is data: it fills in what `transformers` assumes where its configuration is silent, and says how its decoder
differs from Llama's. To add one, write the function that reads its fields and the one that writes them, enter both in
FAMILIES with the names of its tensors where they differ, and give it a row in tests/families.py, or a definition to
judge it by, as tests/step3.py is one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stepladder.parallel.config_fields import FIELDS, as_tuple
from stepladder.parallel.experts import ExpertSpec
from stepladder.parallel.rope_config import Config, read_rope, rope_parameters
from stepladder.parallel.typed_json import shown, typed

if TYPE_CHECKING:
    from stepladder.parallel.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FULL, SLIDING = "full_attention", "sliding_attention"
OURS = "stepladder_"  # before the family, in the model_type of a model with a wiring of its own
REMOTE_CODE = "modeling_stepladder"  # the module that computes such a model in `transformers`

# what a tensor is for -> its name without .weight or .bias; {} is the layer's number, a second one the expert's
LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention.norm": "model.layers.{}.input_layernorm",
    "attention.q": "model.layers.{}.self_attn.q_proj",
    "attention.k": "model.layers.{}.self_attn.k_proj",
    "attention.v": "model.layers.{}.self_attn.v_proj",
    "attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "attention.out": "model.layers.{}.self_attn.o_proj",
    "ffn.norm": "model.layers.{}.post_attention_layernorm",
    "ffn.gate": "model.layers.{}.mlp.gate_proj",
    "ffn.up": "model.layers.{}.mlp.up_proj",
    "ffn.down": "model.layers.{}.mlp.down_proj",
}
COHERE_NAMES = LLAMA_NAMES | {"ffn.norm": LLAMA_NAMES["attention.norm"]}  # attention and FFN share a norm
MIXTRAL_NAMES = LLAMA_NAMES | {
    "moe.router": "model.layers.{}.block_sparse_moe.gate",
    "moe.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "moe.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "moe.down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
QWEN_MOE_NAMES = LLAMA_NAMES | {
    "moe.router": "model.layers.{}.mlp.gate",
    "moe.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
    "moe.up": "model.layers.{}.mlp.experts.{}.up_proj",
    "moe.down": "model.layers.{}.mlp.experts.{}.down_proj",
    "moe.shared_gate": "model.layers.{}.mlp.shared_expert.gate_proj",
    "moe.shared_up": "model.layers.{}.mlp.shared_expert.up_proj",
    "moe.shared_down": "model.layers.{}.mlp.shared_expert.down_proj",
    "moe.shared_switch": "model.layers.{}.mlp.shared_expert_gate",
}

STEP3_NAMES = LLAMA_NAMES | {
    "attention.query_norm": "model.layers.{}.self_attn.inter_norm",
    "attention.queries": "model.layers.{}.self_attn.wq",
    "moe.router": "model.layers.{}.moe.gate",
    "moe.gate": "model.layers.{}.moe.gate_proj",
    "moe.up": "model.layers.{}.moe.up_proj",
    "moe.down": "model.layers.{}.moe.down_proj",
    "moe.shared_gate": "model.layers.{}.share_expert.gate_proj",
    "moe.shared_up": "model.layers.{}.share_expert.up_proj",
    "moe.shared_down": "model.layers.{}.share_expert.down_proj",
}

EXPERT_COUNTS = ("num_experts", "num_local_experts")

# Fields that change the mathematics, and the value that leaves it as it is. A family reads a field or refuses others.
# Biases are not among them: where a family has none, the field is ignored, and a bias in the files is what is refused.
# Nor is sliding_window, which families without windows carry along.
NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "use_qk_norm": False,
    "use_sliding_window": False,
    "logit_scale": 1.0,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_experts": None,
    "num_local_experts": None,
    "is_encoder_decoder": False,
    "quantization_config": None,
}


def fields_of(config: Config) -> dict[str, Any]:
    """The arguments of `ModelSpec` that describe this model.

    Raises:
        ValueError: an unknown family, or a field that asks for something this engine does not do; it is named.
        KeyError: a field is missing.
    """
    config = typed(config, FIELDS)
    kind = str(config.get("model_type")).removeprefix(OURS)
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type is {config.get('model_type')!r}; this version serves {', '.join(sorted(FAMILIES))}"
        )
    if config.get("hidden_act") == "swish":  # its other name
        config["hidden_act"] = "silu"
    return FAMILIES[kind].read(config) | {"family": kind}


def identity(family: str, residual: str) -> dict[str, Any]:
    """What a `config.json` calls the model. One whose wiring is not its family's own has names of ours, so that nobody
    takes it for another model; `modeling_stepladder.py` beside the weights has `transformers` compute it."""
    theirs = FAMILIES[family].architecture
    if residual == FAMILIES[family].residual:
        return {"architectures": [theirs], "model_type": family}
    name = f"Stepladder{theirs.removesuffix('ForCausalLM')}"
    if not FAMILIES[family].in_transformers:
        return {"architectures": [f"{name}ForCausalLM"], "model_type": OURS + family}
    classes = {"AutoConfig": f"{name}Config", "AutoModelForCausalLM": f"{name}ForCausalLM"}
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": OURS + family,
        "auto_map": {auto: f"{REMOTE_CODE}.{one}" for auto, one in classes.items()},
    }


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        architecture: its class in `transformers`.
        read: the arguments of `ModelSpec` that a `config.json` describes.
        write: fields of the `config.json` of a ModelSpec, besides those that all families have in common.
        names: of its tensors, as `LLAMA_NAMES`.
        residual: its own wiring, which its class in `transformers` has.
        in_transformers: whether there is such a class.
    """

    architecture: str
    read: Callable[[Config], dict[str, Any]]
    write: Callable[["ModelSpec"], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    residual: str = "standard"
    in_transformers: bool = True

    @property
    def stacked_experts(self) -> bool:
        """Whether one tensor has the matrices of all experts that are alike."""
        return "moe.gate" in self.names and self.names["moe.gate"].count("{}") == 1


def _llama(config: Config) -> dict[str, Any]:
    fields = _decoder(config)
    return fields | _attention_bias(config) | {"mlp_bias": bool(config.get("mlp_bias"))}


def _mistral(config: Config) -> dict[str, Any]:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 1 << 17, "sliding_window": 4096} | dict(config)
    kinds = [SLIDING if config["sliding_window"] else FULL] * config["num_hidden_layers"]
    return _decoder(config, kinds)


def _qwen2(config: Config) -> dict[str, Any]:
    return _qwen(config) | {"qkv_bias": True}


def _qwen3(config: Config) -> dict[str, Any]:
    fields = _qwen({"head_dim": 128} | dict(config))
    return fields | _attention_bias(config) | {"qk_norm": "shared"}


def _qwen(config: Config, reads: tuple[str, ...] = ()) -> dict[str, Any]:
    """The layers from `max_window_layers` on have a window, unless `layer_types` (transformers 5) says which."""
    config = {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    } | dict(config)
    if not config["use_sliding_window"]:
        config["sliding_window"] = None
    first = config["num_hidden_layers"] if not config["sliding_window"] else config["max_window_layers"]
    kinds = [SLIDING if layer >= first else FULL for layer in range(config["num_hidden_layers"])]
    return _decoder(config, config.get("layer_types") or kinds, ("use_sliding_window", *reads))


def _mixtral(config: Config) -> dict[str, Any]:
    config = {
        "num_key_value_heads": 8,
        "max_position_embeddings": 1 << 17,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    } | dict(config)
    kinds = [SLIDING if config["sliding_window"] else FULL] * config["num_hidden_layers"]
    experts = ExpertSpec(
        layers=tuple(range(config["num_hidden_layers"])),
        count=_experts(config, 8),
        per_token=config["num_experts_per_tok"],
        inner=config["intermediate_size"],
    )
    return _decoder(config, kinds, EXPERT_COUNTS) | {"experts": experts}


def _qwen2_moe(config: Config) -> dict[str, Any]:
    config = {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632, "qkv_bias": True} | dict(config)
    fields = _qwen(config, EXPERT_COUNTS) | {"qkv_bias": bool(config["qkv_bias"])}
    return fields | {"experts": _qwen_experts(config, 60, 4, 1408, config["shared_expert_intermediate_size"])}


def _qwen3_moe(config: Config) -> dict[str, Any]:
    """All layers have the window, if there is one."""
    config = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
    } | dict(config)
    if not config["use_sliding_window"]:
        config["sliding_window"] = None
    kinds = [SLIDING if config["sliding_window"] else FULL] * config["num_hidden_layers"]
    fields = _decoder(config, kinds, ("use_sliding_window", *EXPERT_COUNTS)) | _attention_bias(config)
    return fields | {"qk_norm": "shared", "experts": _qwen_experts(config, 128, 8, 768, 0)}


def _qwen_experts(config: Config, count: int, per_token: int, inner: int, shared: int) -> ExpertSpec | None:
    """The arguments are what the family assumes where the configuration is silent."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    layers = [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]
    count = _experts(config, count)
    if not count or not layers:
        return None
    return ExpertSpec(
        layers=tuple(layers),
        count=count,
        per_token=config.get("num_experts_per_tok") or per_token,
        inner=config.get("moe_intermediate_size", inner),
        shared_inner=shared,
        shared_gate=bool(shared),
        renormalise=bool(config.get("norm_topk_prob")),
    )


def _step3(config: Config) -> dict[str, Any]:
    """The language model of Step-3, as `vllm` reads it; `transformers` has no class of it."""
    config = {
        "num_attention_groups": 1,
        "head_dim": 256,
        "max_position_embedding": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    } | dict(config)
    if config["num_attention_groups"] != 1:
        raise ValueError(f"num_attention_groups is {config['num_attention_groups']}; only 1 is supported")
    layers = config["num_hidden_layers"]
    chosen = config.get("moe_layers_enum")
    if isinstance(chosen, str):  # "4,5,6"
        chosen = [int(part) if part.strip().isdecimal() else -1 for part in chosen.split(",") if part.strip()]
    chosen = tuple(range(1, layers)) if chosen is None else tuple(sorted({*chosen}))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < layers:
        raise ValueError(
            f"moe_layers_enum is {shown(config['moe_layers_enum'])}; it must name layers 0 to {layers - 1}"
        )
    experts = ExpertSpec(
        layers=chosen,
        count=config["moe_num_experts"],
        per_token=config["moe_top_k"],
        inner=config["moe_intermediate_size"],
        shared_inner=config["share_expert_dim"],
        renormalise=bool(config.get("norm_expert_weight")),
    )
    config |= {"num_key_value_heads": 1, "max_position_embeddings": config["max_position_embedding"]}
    return _decoder(config) | {"query_rank": config["share_q_dim"], "experts": experts if chosen else None}


def _experts(config: Config, count: int) -> int:
    """How many there are; versions of transformers write either name."""
    named = [config[name] for name in EXPERT_COUNTS if config.get(name) is not None]
    if len(set(named)) > 1:
        raise ValueError(f"num_experts is {config['num_experts']}, but num_local_experts {config['num_local_experts']}")
    return named[0] if named else count


def _cohere(config: Config) -> dict[str, Any]:
    """Attention and FFN of a layer read one norm and share one residual addition: the parallel wiring."""
    config = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "logit_scale": 0.0625} | dict(config)
    if not rope_parameters(config).get("rope_theta") and not config.get("rope_theta"):
        raise KeyError("rope_theta")  # versions of transformers assume different ones
    fields = _decoder(config, reads=("use_qk_norm", "logit_scale")) | _attention_bias(config)
    return fields | {
        "residual": config.get("residual") or FAMILIES["cohere"].residual,
        "norm": "layer",
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "qk_norm": "per-head" if config.get("use_qk_norm") else "none",
        "rope_interleaved": True,
        "logit_scale": config["logit_scale"],
    }


def _attention_bias(config: Config) -> dict[str, bool]:
    return dict.fromkeys(("qkv_bias", "out_bias"), bool(config.get("attention_bias")))


def _write_llama(spec: "ModelSpec") -> dict[str, Any]:
    return {"rms_norm_eps": spec.norm_eps, "attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _write_mistral(spec: "ModelSpec") -> dict[str, Any]:
    return {"rms_norm_eps": spec.norm_eps, "sliding_window": spec.window(0)}


def _write_qwen2(spec: "ModelSpec") -> dict[str, Any]:
    return {
        "rms_norm_eps": spec.norm_eps,
        "use_sliding_window": bool(spec.windows),
        "sliding_window": next((window for window in spec.windows if window), None),
        "layer_types": [SLIDING if spec.window(layer) else FULL for layer in range(spec.num_layers)],
    }


def _write_qwen3(spec: "ModelSpec") -> dict[str, Any]:
    return _write_qwen2(spec) | {"attention_bias": spec.qkv_bias}


def _write_mixtral(spec: "ModelSpec") -> dict[str, Any]:
    assert spec.experts
    return _write_mistral(spec) | {
        "num_local_experts": spec.experts.count,
        "num_experts_per_tok": spec.experts.per_token,
    }


def _write_qwen2_moe(spec: "ModelSpec") -> dict[str, Any]:
    return _write_qwen2(spec) | _write_qwen_experts(spec) | {"qkv_bias": spec.qkv_bias}


def _write_qwen3_moe(spec: "ModelSpec") -> dict[str, Any]:
    fields = {"rms_norm_eps": spec.norm_eps, "attention_bias": spec.qkv_bias, "use_sliding_window": bool(spec.windows)}
    return fields | {"sliding_window": spec.window(0)} | _write_qwen_experts(spec)


def _write_qwen_experts(spec: "ModelSpec") -> dict[str, Any]:
    experts = spec.experts
    if experts is None:
        return {"num_experts": 0}
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.inner,
        "norm_topk_prob": experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(spec.num_layers) if layer not in experts.layers],
    } | ({"shared_expert_intermediate_size": experts.shared_inner} if experts.shared_inner else {})


def _write_step3(spec: "ModelSpec") -> dict[str, Any]:
    experts = spec.experts or ExpertSpec(layers=(), count=1, per_token=1, inner=spec.intermediate_size)
    return {
        "rms_norm_eps": spec.norm_eps,
        "num_attention_groups": spec.num_kv_heads,
        "max_position_embedding": spec.max_position,
        "share_q_dim": spec.query_rank,
        "moe_layers_enum": ",".join(map(str, experts.layers)),
        "moe_num_experts": experts.count,
        "moe_top_k": experts.per_token,
        "moe_intermediate_size": experts.inner,
        "share_expert_dim": experts.shared_inner,
        "norm_expert_weight": experts.renormalise,
    }


def _write_cohere(spec: "ModelSpec") -> dict[str, Any]:
    return {
        "layer_norm_eps": spec.norm_eps,
        "attention_bias": spec.qkv_bias,
        "use_qk_norm": spec.qk_norm != "none",
        "logit_scale": spec.logit_scale,
    }


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _write_qwen3),
    "mixtral": Family("MixtralForCausalLM", _mixtral, _write_mixtral, MIXTRAL_NAMES),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, _write_qwen2_moe, QWEN_MOE_NAMES),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _write_qwen3_moe, QWEN_MOE_NAMES),
    "step3_text": Family("Step3TextForCausalLM", _step3, _write_step3, STEP3_NAMES, in_transformers=False),
    "cohere": Family("CohereForCausalLM", _cohere, _write_cohere, COHERE_NAMES, "parallel"),
}


def _decoder(config: Config, kinds: Sequence[str] | None = None, reads: tuple[str, ...] = ()) -> dict[str, Any]:
    """What all families have in common.

    Args:
        kinds: the attention of each layer, FULL or SLIDING; all full if None. `layer_types` must agree with it.
        reads: the fields among NEUTRAL that the family itself looks after.
    """
    for name, neutral in NEUTRAL.items():
        nothing = neutral is None and not config.get(name)  # no experts, an empty quantization_config
        if name not in reads and not nothing and config.get(name, neutral) not in (neutral, None):
            raise ValueError(
                f"{name} is {shown(config[name])}; for {config['model_type']} only {neutral!r} is supported"
            )
    layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": config["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "max_position": config.get("max_position_embeddings", 2048),
        "windows": _windows(config, kinds or [FULL] * layers),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "residual": config.get("residual") or "standard",
        "ladder_layers": _ladder_layers(config.get("ladder_layers"), layers),
        "dtype": _dtype(dtype_name(config) or "float32"),
        "eos_ids": as_tuple(config.get("eos_token_id")),
    } | read_rope(config)


def _windows(config: Config, kinds: Sequence[str]) -> tuple[int | None, ...]:
    """The window of each layer; () where no layer has one."""
    named, window = tuple(config.get("layer_types") or kinds), config.get("sliding_window")
    layers = config["num_hidden_layers"]
    if len(named) != layers or set(named) - {FULL, SLIDING}:
        raise ValueError(
            f"layer_types is {shown(named)}; it must name {FULL!r} or {SLIDING!r} for each of {layers} layers"
        )
    if named != tuple(kinds):
        raise ValueError(f"layer_types is {shown(named)}; for {config['model_type']} only {shown(kinds)} is supported")
    if SLIDING not in named:
        return ()
    if not window:
        raise ValueError(f"layer_types has {SLIDING!r}, but sliding_window is not set or not used")
    return tuple(window if kind == SLIDING else None for kind in named)


def _ladder_layers(value: int | tuple[int, ...] | None, num_layers: int) -> tuple[int, ...] | None:
    """An integer n means the last n layers; a list names them; None means all of them."""
    if isinstance(value, int):
        if not 0 <= value <= num_layers:
            raise ValueError(f"ladder_layers is {value}, but the model has {num_layers} layers")
        return tuple(range(num_layers - value, num_layers))
    return None if value is None else tuple(sorted(value))


def dtype_name(config: Config) -> str | None:
    """What the file says the weights are in; None where it leaves that to them."""
    name = config.get("dtype") or config.get("torch_dtype") or "auto"
    return None if name == "auto" else name.removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]
