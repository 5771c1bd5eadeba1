"""Random checkpoints of every family, with the shapes and options that trip up sharding, judged by `transformers`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.llama import SMALL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# model_type, then what differs from tests.llama.SMALL: 101 words, 4 heads of 12 over hidden 32, 2 KV heads, 3 layers
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "model_type": "llama",
        "rope_parameters": LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 1,
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "num_key_value_heads": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "head_dim": 8,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "cohere": {"model_type": "cohere", "attention_bias": True, "logit_scale": 0.25, "tie_word_embeddings": True},
    "cohere-qk-norm": {"model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.5, "num_key_value_heads": 1},
}


def write_family(directory: Path, family: str, seed: int = 8, gain: float = 3.0, **fields: Any) -> Path:
    """A checkpoint whose weights vary; so much by default (`gain`) that greedy decoding does not loop at once."""
    torch.manual_seed(seed)
    chosen = {"layer_norm_eps": 1e-5, "pad_token_id": None, **SMALL, **FAMILIES[family], **fields}
    if "rope_parameters" in chosen:
        del chosen["rope_theta"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**chosen), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):  # a router: no two experts are as good as each other
                parameter.normal_(0, 4.0 / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.0 if "embed" in name else gain / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return directory


def read_oracle(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `transformers`, with eager attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
