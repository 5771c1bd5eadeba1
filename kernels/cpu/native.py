"""The native kernels of CPU ranks, each with its definition in plain torch beside it: the oracle of the tests.

All arithmetic is in fp32; weights and cache may be fp32, bf16 or fp16. A row's bits do not depend on the rows beside
it: not in a product, not in a norm, not in attention, however a prompt is cut into chunks.

Letters: T tokens, N outputs, K inputs, H query heads, G of them per KV head, D head dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.kernels.cpu.build import load
from stepladder.kernels.norm import layer_norm, rms_norm
from stepladder.kernels.rope import rotate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PANEL, LANE = 64, 16  # outputs of a panel; cached keys that lie side by side


def ops() -> Any:
    """The operators, compiled on first use."""
    load()
    return torch.ops.stepladder_cpu


@contextmanager
def computing(native: bool) -> Iterator[None]:
    """Inference. With native kernels, torch computes on one thread meanwhile, and they on all that torch had.

    Both kinds of threads look for work for a while before they sleep. Each would keep the other from its core.
    """
    with torch.inference_mode():
        took = native and ops().take_threads()
        try:
            yield
        finally:
            if took:
                ops().give_back_threads()


@dataclass(frozen=True)
class NormWeight:
    """A norm: weight fp32 [K] or [heads, D], of the layer or the RMS kind."""

    weight: Tensor
    eps: float
    layer: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> the same, in the dtype of x."""
        return ops().norm(x, self.weight, self.eps, self.layer)

    def defined(self, x: Tensor) -> Tensor:
        """The same in plain torch."""
        return (layer_norm if self.layer else rms_norm)(x, self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class Projection:
    """y = (gate or not)(norm(x) W^T + bias), in one pass over W.

    Attributes:
        panels: W in the dtype of the checkpoint, [N / 64, K, 64]: a tile of the product reads one stream of memory. If
            gated, the first 32 columns of a panel are gates, the others what they let through.
        outputs: N, before it was padded.
        dtype: of the result.
        bias: fp32 [N / 64, 64]. norm: of every row of x before.
    """

    panels: Tensor
    outputs: int
    dtype: torch.dtype
    gated: bool = False
    bias: Tensor | None = None
    norm: NormWeight | None = None

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None = None,
        norm: NormWeight | None = None,
        gated: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Projection":
        """weight: [N, K]; gated: its first half are gates. dtype: of the result; None is that of the weight."""
        with torch.inference_mode():
            panels = _panels(weight.detach(), gated).transpose(1, 2).contiguous()
            wide = None if bias is None else _panels(bias.detach().float()[:, None], gated)[..., 0].contiguous()
        return Projection(panels, len(weight), dtype or weight.dtype, gated, wide, norm)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], or [T, N / 2] if gated."""
        norm = self.norm
        weight, eps, layer = (norm.weight, norm.eps, norm.layer) if norm else (None, 0.0, False)
        return ops().project(x, self.panels, self.outputs, self.bias, self.gated, weight, eps, layer, self.dtype)

    def defined(self, x: Tensor) -> Tensor:
        """The same in plain torch, in the dtype of x."""
        flat = self.panels.transpose(1, 2).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = self.norm.defined(x) if self.norm else x
        if not self.gated:
            y = F.linear(x, flat.flatten(0, 1), None if bias is None else bias.flatten())
            return y[:, : self.outputs]
        half = PANEL // 2
        gate, up = (
            F.linear(x, flat[:, part].flatten(0, 1), None if bias is None else bias[:, part].flatten())
            for part in (slice(half), slice(half, PANEL))
        )
        return (F.silu(gate) * up)[:, : self.outputs // 2]


def _panels(rows: Tensor, gated: bool) -> Tensor:
    """[N, K] -> [panels, 64, K], with zeros behind."""
    parts = rows.chunk(2) if gated else (rows,)
    size = PANEL // len(parts)
    count = -(-len(parts[0]) // size)
    padded = [F.pad(part, (0, 0, 0, count * size - len(part))).view(count, size, -1) for part in parts]
    return torch.cat(padded, dim=1)


def lane_of(block_size: int) -> int:
    """How many keys of a cache block lie side by side: their scores are computed together."""
    return LANE if block_size % LANE == 0 else block_size


def lay_out_keys(keys: Tensor) -> Tensor:
    """[..., block size, heads, D], as a plain cache has them -> [..., heads, block size / lane, D, lane]."""
    lane = lane_of(keys.shape[-3])
    return keys.movedim(-2, -3).unflatten(-2, (-1, lane)).transpose(-1, -2).contiguous()


def lay_out_values(values: Tensor) -> Tensor:
    """[..., block size, heads, D], as a plain cache has them -> [..., heads, block size, D]."""
    return values.movedim(-2, -3).contiguous()


def rope_table(positions: Tensor, frequencies: Tensor, interleaved: bool, factor: float) -> tuple[Tensor, Tensor]:
    """`kernels.rope.rope_table` in fp32: two [T, D], a row's bits its own."""
    return ops().rope_table(positions, frequencies, interleaved, factor)


@dataclass(frozen=True)
class Rotation:
    """What happens to queries and keys between their product and the cache."""

    heads: int
    interleaved: bool
    q_norm: NormWeight | None = None
    k_norm: NormWeight | None = None

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Norm and turn queries and keys; keys and values go to their slots of the cache.

        Args:
            qkv: fp32 [T, (H + 2 K) D]. cos, sin: fp32 [T, D]. slots: [T].
            keys: [blocks, K, size / lane, D, lane]. values: [blocks, K, size, D].

        Returns:
            The queries, fp32 [T, H, D].
        """
        q_norm, k_norm = self.q_norm, self.k_norm
        one = q_norm or k_norm
        eps, layer = (one.eps, one.layer) if one else (0.0, False)
        q_weight, k_weight = q_norm and q_norm.weight, k_norm and k_norm.weight
        return ops().rotate_and_store(
            qkv, cos, sin, slots, self.heads, q_weight, k_weight, eps, layer, self.interleaved, keys, values
        )

    def defined(self, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same in plain torch, without the cache: queries [T, H, D], keys and values [T, K, D]."""
        q, k, v = qkv.unflatten(-1, (-1, cos.shape[-1])).split([self.heads, kv_heads, kv_heads], dim=1)
        q, k = (norm.defined(x) if norm else x for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        q, k = (rotate(x, cos[:, None], sin[:, None], self.interleaved) for x in (q, k))
        return q, k, v


def attend(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, positions: Tensor, tables: Tensor, window: int | None
) -> Tensor:
    """Attention of a ragged batch over its cached contexts; `kernels.attention.paged_attention` defines it.

    Args:
        q: fp32 [T, H, D]. keys, values: as `Rotation` writes them.
        first: [B + 1], where each sequence's rows begin. positions: [T], of each row in its own sequence.
        tables: [B, n], cache blocks of each context; what stands behind a context is not looked at.
        window: a row sees so many positions, its own the last of them; None: all before it.

    Returns:
        fp32 [T, H * D].
    """
    return ops().attend(q, keys, values, first, positions, tables, window or 0)
