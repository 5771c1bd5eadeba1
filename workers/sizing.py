"""How many tokens of KV cache fit beside the model, measured after a step of the largest size."""

import torch

from stepladder.parallel.model import Transformer
from stepladder.workers.config import MEMORY_FRACTION, EngineConfig, KvConfig
from stepladder.workers.executor import Executor
from stepladder.workers.memory import available


def kv_size(executor: Executor, engine: EngineConfig, kv: KvConfig, device: torch.device, ranks_here: int = 1) -> int:
    """Tokens that the cache of this rank is to hold, in whole blocks: as configured, or as many as fit. Every rank
    calls.

    Raises:
        ValueError: not even one sequence of the longest length fits.
    """
    if kv.tokens is not None:
        return kv.whole(kv.tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    executor.warm_up(engine.max_step_tokens, engine.max_sequences, kv.block_size)
    return _capacity(executor.model, engine, kv, device, ranks_here)


def _capacity(model: Transformer, engine: EngineConfig, kv: KvConfig, device: torch.device, ranks_here: int) -> int:
    """Tokens that this rank can cache; whole blocks, and no more than its sequences could ever use twice over."""
    spec, size = model.spec, torch.empty((), dtype=model.spec.dtype).element_size()
    per_token = 2 * spec.num_layers * model.num_kv_heads * spec.head_dim * size
    room = _room(kv.memory_fraction or MEMORY_FRACTION, device, ranks_here)
    useful = 2 * engine.max_sequences * (engine.max_model_len or spec.max_position)
    tokens = kv.whole(min(room // per_token, useful + kv.block_size - 1))
    if tokens < (engine.max_model_len or kv.block_size):
        raise ValueError(
            f"only {max(0, tokens)} tokens of KV cache fit ({room / 2**30:.1f} GiB at {per_token} bytes a token), "
            f"fewer than one sequence needs; raise kv.memory_fraction, lower engine.max_model_len or use more ranks"
        )
    return tokens


def _room(fraction: float, device: torch.device, ranks_here: int) -> int:
    """Bytes left for the cache: on CUDA beside what the warm-up needed at its peak, which the allocator gives back."""
    if device.type == "cuda":
        step = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(total * fraction) - (total - free) - step
    return int(available() * fraction) // ranks_here
