"""Random checkpoints, written and judged by `transformers`."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 101,  # prime: no multiple of any group's size
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden / heads
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
}


def write_llama(directory: Path, seed: int = 0, **fields: Any) -> Path:
    """A Llama whose weights vary enough for greedy decoding not to fall into a loop at once."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.0 if "embed" in name else 3.0 / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)
    return directory


def read_llama(directory: Path) -> LlamaForCausalLM:
    """The oracle: fp32, eager attention."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def oracle_logits(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Logits at every position: [len(tokens), vocab]."""
    return model(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def oracle_greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """What `generate` continues the prompt with."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[misc]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()
