"""How many tokens of KV cache fit beside the model, measured after a step of the largest size."""

import psutil
import torch

from parallel.context import KVCache, PagedSequences
from parallel.model import Transformer
from workers.config import EngineConfig, KvConfig


def kv_size(model: Transformer, engine: EngineConfig, kv: KvConfig, device: torch.device, ranks_here: int = 1) -> int:
    """Tokens that the cache of this rank is to hold: as configured, or as many as fit. Every rank calls.

    Raises:
        ValueError: not even one sequence of the longest length fits.
    """
    if kv.tokens is not None:
        return kv.tokens
    _warm_up(model, engine, kv.block_size, device)
    return _capacity(model, engine, kv, device, ranks_here)


@torch.inference_mode()
def _warm_up(model: Transformer, engine: EngineConfig, block_size: int, device: torch.device) -> None:
    """The largest step there can be, so that what the libraries allocate on the way is allocated."""
    blocks = -(-engine.max_step_tokens // block_size)
    cache = KVCache(model.spec, model.num_kv_heads, blocks, block_size, device)
    tokens = torch.zeros(engine.max_step_tokens, dtype=torch.int64, device=device)
    hidden = model(tokens, PagedSequences(cache, [0], [len(tokens)], [list(range(blocks))]))
    model.logits(hidden[-min(engine.max_sequences, len(tokens)) :])


def _capacity(model: Transformer, engine: EngineConfig, kv: KvConfig, device: torch.device, ranks_here: int) -> int:
    """Tokens that this rank can cache; whole blocks, and no more than its sequences could ever use twice over."""
    spec, size = model.spec, torch.empty((), dtype=model.spec.dtype).element_size()
    per_token = 2 * spec.num_layers * model.num_kv_heads * spec.head_dim * size
    room = _room(kv.memory_fraction, device, ranks_here)
    useful = 2 * engine.max_sequences * (engine.max_model_len or spec.max_position)
    tokens = min(room // per_token, useful) // kv.block_size * kv.block_size
    if tokens < (engine.max_model_len or kv.block_size):
        raise ValueError(
            f"only {max(0, tokens)} tokens of KV cache fit ({room / 2**30:.1f} GiB at {per_token} bytes a token), "
            f"fewer than one sequence needs; raise kv.memory_fraction, lower engine.max_model_len or use more ranks"
        )
    return tokens


def _room(fraction: float, device: torch.device, ranks_here: int) -> int:
    """Bytes left for the cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(total * fraction) - (total - free)
    return int(psutil.virtual_memory().available * fraction) // ranks_here
