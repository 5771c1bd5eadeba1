"""The fields of a `config.json` that are read: their types, and the ranges in which a model can be."""

from collections.abc import Mapping

from stepladder.parallel.typed_json import FLAG, OBJECT, TEXT, Kind, either, number, optional, several, whole

WIDEST, DEEPEST = 1 << 24, 1 << 12  # dimensions of a matrix, layers
HEADS = EXPERTS = 1 << 16
LONGEST = (1 << 31) - 1  # positions
TOKEN_IDS = optional(either(whole(0, WIDEST), several(whole(0, WIDEST))))

FIELDS: Mapping[str, Kind] = {
    "model_type": TEXT,
    "vocab_size": whole(1, WIDEST),
    "hidden_size": whole(1, WIDEST),
    "intermediate_size": whole(1, WIDEST),
    "num_hidden_layers": whole(1, DEEPEST),
    "num_attention_heads": whole(1, HEADS),
    "num_key_value_heads": optional(whole(1, HEADS)),
    "head_dim": optional(whole(1, HEADS)),
    "max_position_embeddings": whole(1, LONGEST),
    "original_max_position_embeddings": optional(whole(2, LONGEST)),
    "sliding_window": optional(whole(0, LONGEST)),  # 0 is none, too
    "max_window_layers": whole(0, LONGEST),
    "use_sliding_window": optional(FLAG),
    "layer_types": optional(several(TEXT)),
    "num_experts": optional(whole(0, EXPERTS)),
    "num_local_experts": optional(whole(0, EXPERTS)),
    "num_experts_per_tok": optional(whole(1, EXPERTS)),
    "moe_intermediate_size": whole(1, WIDEST),
    "shared_expert_intermediate_size": whole(0, WIDEST),
    "decoder_sparse_step": whole(1, DEEPEST),
    "mlp_only_layers": optional(several(whole(0, DEEPEST))),
    "norm_topk_prob": optional(FLAG),
    "num_attention_groups": whole(1, HEADS),
    "max_position_embedding": whole(1, LONGEST),
    "share_q_dim": whole(1, WIDEST),
    "moe_layers_enum": optional(either(TEXT, several(whole(0, DEEPEST)))),
    "moe_num_experts": whole(1, EXPERTS),
    "moe_top_k": whole(1, EXPERTS),
    "share_expert_dim": whole(0, WIDEST),
    "norm_expert_weight": optional(FLAG),
    "qkv_bias": optional(FLAG),
    "hidden_act": optional(TEXT),
    "attention_bias": optional(FLAG),
    "mlp_bias": optional(FLAG),
    "use_qk_norm": optional(FLAG),
    "tie_word_embeddings": optional(FLAG),
    "rms_norm_eps": number(0, 1, above=True),
    "layer_norm_eps": number(0, 1, above=True),
    "logit_scale": number(0, above=True),
    "rope_theta": optional(number(1, 1e30, above=True)),
    "rope_scaling": optional(either(OBJECT, TEXT)),
    "rope_parameters": optional(either(OBJECT, TEXT)),
    "residual": optional(TEXT),
    "ladder_layers": optional(either(whole(0, DEEPEST), several(whole(0, DEEPEST)))),
    "dtype": optional(TEXT),
    "torch_dtype": optional(TEXT),
    "eos_token_id": TOKEN_IDS,
}

FACTOR = number(0, 1e9, above=True)
ROPE: Mapping[str, Kind] = {  # of rope_scaling and rope_parameters
    "rope_type": optional(TEXT),
    "type": optional(TEXT),
    "rope_theta": FIELDS["rope_theta"],
    "partial_rotary_factor": optional(number(0, 1, above=True)),
    "original_max_position_embeddings": FIELDS["original_max_position_embeddings"],
    "truncate": optional(FLAG),
    "short_factor": optional(several(FACTOR)),
    "long_factor": optional(several(FACTOR)),
} | dict.fromkeys(
    ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), optional(FACTOR)
) | dict.fromkeys(("mscale", "mscale_all_dim"), optional(number(0, 1e9)))  # fmt: skip


def as_tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Token ids, which Hugging Face writes as one integer, a list or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
