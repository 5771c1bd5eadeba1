"""How many tokens of KV cache fit beside the model: measured after a step of the largest size, or asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepladder.parallel.heads import heads_of
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import ALONE, Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.config import MEMORY_FRACTION, EngineConfig, KvConfig
from stepladder.workers.executor import Executor
from stepladder.workers.memory import available, total

ALLOCATOR = "can't allocate memory"  # in what torch says when the host has none; it has no class of its own


def kv_size(
    executor: Executor,
    engine: EngineConfig,
    kv: KvConfig,
    device: torch.device,
    ranks_here: int = 1,
    own_ranks_here: int = 1,
) -> int:
    """Tokens that the cache of this rank is to hold, in whole blocks: as configured, or as many as fit. Every rank
    calls.

    Args:
        ranks_here: ranks of the deployment on this machine. own_ranks_here: those of this rank's group.

    Raises:
        ValueError: the number that is configured does not fit, or not even one sequence of the longest length.
    """
    if kv.tokens is not None:
        model = executor.model
        _refuse_too_large(bytes_per_token(model.spec, model.num_kv_heads), kv, device, ranks_here, own_ranks_here)
        return kv.whole(kv.tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    executor.warm_up(engine.max_step_tokens, engine.max_sequences, kv.block_size)
    return _capacity(executor.model, engine, kv, device, ranks_here)


def check_kv(
    spec: ModelSpec,
    kv: KvConfig,
    device: torch.device,
    shard: Shard = ALONE,
    ranks_here: int = 1,
    own_ranks_here: int = 1,
) -> None:
    """Before any weight is read, which may take minutes: arguments as `kv_size`'s.

    Raises:
        ValueError: `kv.tokens` do not even fit without the model.
    """
    if kv.tokens is not None:
        _refuse_too_large(bytes_per_token(spec, len(heads_of(spec, shard).kv)), kv, device, ranks_here, own_ranks_here)


def bytes_per_token(spec: ModelSpec, kv_heads: int) -> int:
    """Of keys and values of all layers."""
    return 2 * spec.num_layers * kv_heads * spec.head_dim * torch.empty((), dtype=spec.dtype).element_size()


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """An allocator's refusal is a sentence: the same would be refused again.

    Raises:
        ValueError: memory was not enough for `what`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and ALLOCATOR not in str(error):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what} does not fit into memory; use more ranks or smaller limits ({said})") from None


def _refuse_too_large(per_token: int, kv: KvConfig, device: torch.device, ranks_here: int, own_ranks_here: int) -> None:
    """What is free is shared with those that start together, a group; what there is at all, with all of the machine:
    a group that is started again finds the memory of the others taken."""
    assert kv.tokens is not None
    needed = kv.whole(kv.tokens) * per_token
    if device.type == "cuda":
        rooms = [(torch.cuda.mem_get_info(device)[0], 1, "free on this GPU")]
    else:
        rooms = [(available(), own_ranks_here, "free on this machine"), (total(), ranks_here, "in this machine at all")]
    for room, ranks, where in rooms:
        if needed * ranks > room:
            each = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise ValueError(
                f"kv.tokens is {kv.tokens}, whose KV cache needs {_gb(needed)}{each}, but there are {_gb(room)} "
                f"{where}; set fewer, or null, which takes what fits"
            )


def _capacity(model: Transformer, engine: EngineConfig, kv: KvConfig, device: torch.device, ranks_here: int) -> int:
    """Tokens that this rank can cache; whole blocks, and no more than its sequences could ever use twice over."""
    spec = model.spec
    per_token = bytes_per_token(spec, model.num_kv_heads)
    room = _room(kv.memory_fraction or MEMORY_FRACTION, device, ranks_here)
    useful = 2 * engine.max_sequences * (engine.max_model_len or spec.max_position)
    tokens = kv.whole(min(room // per_token, useful + kv.block_size - 1))
    if tokens < (engine.max_model_len or kv.block_size):
        raise ValueError(
            f"only {max(0, tokens)} tokens of KV cache fit ({_gb(room)} at {per_token} bytes a token), "
            f"fewer than one sequence needs; raise kv.memory_fraction, lower engine.max_model_len or use more ranks"
        )
    return tokens


def _room(fraction: float, device: torch.device, ranks_here: int) -> int:
    """Bytes left for the cache: on CUDA beside what the warm-up needed at its peak, which the allocator gives back."""
    if device.type == "cuda":
        step = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info(device)
        return int(whole * fraction) - (whole - free) - step
    return int(available() * fraction) // ranks_here


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
