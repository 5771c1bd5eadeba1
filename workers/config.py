"""An engine's options, as a person sets them, and what they come to for one model."""

from dataclasses import dataclass, replace

import torch

from stepladder.parallel.native import AUTO, KERNELS, NATIVE, TORCH
from stepladder.parallel.spec import DTYPES, ModelSpec
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.server.queue_limits import QueueLimits

MEMORY_FRACTION = 0.9
FOR_SERVERS = ("max_queued_tokens", "max_queued_requests", "max_queue_seconds")  # offline, everything is queued


@dataclass(frozen=True, kw_only=True)
class KvConfig:
    """The KV cache of an engine.

    Attributes:
        tokens: how many tokens it holds, in whole blocks; None measures how many fit.
        memory_fraction: if measured, the share of a GPU's memory that model, largest step and cache may take together,
            or on CPU the share of what is left for the cache; None takes 0.9.
        block_size: tokens of a block, the unit in which sequences get room.
        prefix_caching: keep and share the blocks of known beginnings of prompts.
    """

    tokens: int | None = None
    memory_fraction: float | None = None
    block_size: int = 16
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"kv.block_size is {self.block_size}; it must be at least 1")
        if self.tokens is not None and self.tokens < self.block_size:
            raise ValueError(f"kv.tokens is {self.tokens}; it must be at least kv.block_size ({self.block_size})")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ValueError(f"kv.memory_fraction is {self.memory_fraction}; it must be above 0 and at most 1")
        if self.memory_fraction is not None and self.tokens is not None:
            raise ValueError(
                f"kv.memory_fraction is {self.memory_fraction}, but kv.tokens is {self.tokens}, so that nothing is "
                "measured; set one of them to null"
            )

    def whole(self, tokens: int) -> int:
        """Of so many tokens, those in whole blocks."""
        return tokens // self.block_size * self.block_size


@dataclass(frozen=True, kw_only=True)
class AfdConfig:
    """How attention ranks and the FFN pool work together; see `LayoutConfig` for the first three.

    Attributes:
        home: a row goes to one FFN rank, not to all.
        patience_seconds: how long an attention rank waits for another pool than the one that it has lost while the
            controller goes on naming that one; then it ends, and is put back.
    """

    schedule: str = "auto"
    micro_batches: int | None = None
    wire: str = "plain"
    patience_seconds: float = 30.0
    home: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_sequences: how many sequences run at once.
        max_step_tokens: tokens of one step; longer prompts are prefilled in chunks.
        max_model_len: prompt and output together; None takes the model's own limit (or the KV cache's, if smaller).
        max_queued_tokens: tokens that may wait for a place before requests are refused with 429.
        max_queued_requests: the same for requests.
        max_queue_seconds: the same for how long the newest would probably wait, from how fast the queue has moved.
        threads: CPU threads per rank; None shares the machine's cores among the ranks on it.
        dtype: of weights, activations and KV cache; None takes the checkpoint's.
        kernels: of CPU ranks: `native`, `torch`, or `auto`, which takes native ones where they can be compiled.
        batch_invariant: insist that a request gets the same tokens alone, in any company, at any chunk size and after a
            replay. Native kernels see to that by themselves; so this refuses to run without them, and lets more than
            two tensor-parallel ranks add up in their own order, which sends up to twice as much.
        lookahead: how many steps are queued behind the one whose tokens are read, 0 or 1; None is 1 on CUDA, where the
            device then works while the host plans, and 0 on CPU, where there is nothing to gain.
        cuda_graphs: launch a decode step as one CUDA graph; None does so on CUDA.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    max_model_len: int | None = None
    max_queued_tokens: int = 1 << 17
    max_queued_requests: int = 1024
    max_queue_seconds: float = 30.0
    threads: int | None = None
    dtype: str | None = None
    kernels: str = AUTO
    batch_invariant: bool = False
    lookahead: int | None = None
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"engine.threads is {self.threads}; it must be at least 1, or null")
        for name in FOR_SERVERS:
            if getattr(self, name) <= 0:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be above 0")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"engine.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}, or null")
        if self.kernels not in KERNELS:
            raise ValueError(f"engine.kernels is {self.kernels!r}; it must be one of {', '.join(KERNELS)}")
        if self.batch_invariant and self.kernels == TORCH:
            raise ValueError("engine.batch_invariant needs native kernels, but engine.kernels is torch; set it to auto")
        if self.lookahead not in (None, 0, 1):
            raise ValueError(f"engine.lookahead is {self.lookahead}; it must be 0, 1 or null")

    @property
    def queue_limits(self) -> QueueLimits:
        return QueueLimits(
            tokens=self.max_queued_tokens, requests=self.max_queued_requests, seconds=self.max_queue_seconds
        )

    @property
    def wanted_kernels(self) -> str:
        """What `choose` is asked for."""
        return NATIVE if self.batch_invariant else self.kernels

    def of(self, spec: ModelSpec) -> ModelSpec:
        """The model as this engine runs it."""
        scaling = spec.rope_scaling and spec.rope_scaling.within(self.max_model_len or spec.max_position)
        return replace(spec, rope_scaling=scaling, dtype=DTYPES[self.dtype] if self.dtype else spec.dtype)

    def graphs_on(self, device: torch.device) -> bool:
        """Whether decode steps are launched as CUDA graphs.

        Raises:
            ValueError: they are asked for on another device.
        """
        if self.cuda_graphs and device.type != "cuda":
            raise ValueError(f"engine.cuda_graphs is true, but this engine runs on {device.type}; set it to null")
        return device.type == "cuda" and self.cuda_graphs is not False

    def model_len(self, spec: ModelSpec, kv: KvConfig, kv_tokens: int | None) -> int:
        """Prompt and output together, for a cache of `kv_tokens`; None where it has not been measured yet.

        Raises:
            ValueError: more than the model was made for.
        """
        room = spec.max_position if kv_tokens is None else kv.whole(kv_tokens)
        length = self.max_model_len or min(spec.max_position, room)
        if length > spec.longest:
            raise ValueError(f"engine.max_model_len is {length}, but the model was made for {spec.longest} tokens")
        return length

    def limits(self, spec: ModelSpec, kv: KvConfig, kv_tokens: int, device: torch.device) -> SchedulerConfig:
        """The scheduler's view of this for one model and a cache of `kv_tokens` on `device`.

        Raises:
            ValueError: the limits contradict each other or the model.
        """
        return SchedulerConfig(
            max_sequences=self.max_sequences,
            max_step_tokens=self.max_step_tokens,
            max_model_len=self.model_len(spec, kv, kv_tokens),
            num_blocks=kv_tokens // kv.block_size,
            block_size=kv.block_size,
            prefix_caching=kv.prefix_caching,
            cache_salt=spec.wiring_key,
            eos_ids=spec.eos_ids,
            vocab_size=spec.vocab_size,
            lookahead=int(device.type == "cuda") if self.lookahead is None else self.lookahead,
        )
