"""Attention in plain torch: over a paged KV cache for serving, over whole sequences for training.

Letters: T tokens of the step, H query heads, K KV heads, G = H / K, D head dim, S slots of the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED = 1 << 20  # elements: 4 MB of fp32, which a CPU still has in its cache when it comes to read them


@dataclass(frozen=True)
class Group:
    """The sequences of a step that bring equally many query tokens, padded to the longest context among them.

    The context of a layer with a sliding window begins with the block of the first position that any query sees.

    rows: [B * q] rows of the step's tokens; blocks: [B, n] cache blocks of each context, 0 where padded; length: L, of
    the longest context, at most n * block size; mask: bool [B, 1, q, L], True where a query may look, or None where
    every position is visible to every query; causal: q == L and B == 1, so that SDPA's own causal mask does it.
    """

    rows: Tensor
    blocks: Tensor
    length: int
    mask: Tensor | None
    causal: bool


def causal_attention(q: Tensor, k: Tensor, v: Tensor, batch: int, window: int | None = None) -> Tensor:
    """Whole sequences of equal length, for training: [batch * seq, heads, D] -> [batch * seq, H, D].

    A query sees its own position and those before it, or the last `window` of these.
    """
    q, k, v = (t.view(batch, -1, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v))
    length, mask = q.shape[2], None
    if window is not None and window < length:
        mask = visible(torch.arange(length, device=q.device), length, window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(-1, q.shape[1], q.shape[3])


def visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Which of the keys 0..length-1 queries at `positions` [..., q] see: bool [..., q, length]."""
    keys, queries = torch.arange(length, device=positions.device), positions[..., None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: list[Group]) -> Tensor:
    """Attention of a ragged batch over its cached contexts, which already hold this step's keys and values.

    Args:
        q: [T, H, D].
        k_cache, v_cache: [blocks, block size, K, D].
        groups: cover every row of q exactly once.

    Returns:
        [T, H, D]
    """
    if len(groups) == 1:  # the common step, all decode or one prefill: rows are in order already
        return _attend(q, k_cache, v_cache, groups[0])
    out = torch.empty_like(q)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], k_cache, v_cache, group)
    return out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: Group) -> Tensor:
    batch, (_, heads, dim), kv_heads = len(group.blocks), q.shape, k_cache.shape[2]
    length = len(q) // batch
    if length == 1:
        return _decode(q.view(batch, kv_heads, heads // kv_heads, dim), k_cache, v_cache, group)
    k, v = (_gather(cache, group.blocks, group.length) for cache in (k_cache, v_cache))
    out = F.scaled_dot_product_attention(
        q.view(batch, length, heads, dim).transpose(1, 2), k, v, attn_mask=group.mask, is_causal=group.causal,
        enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return out.transpose(1, 2).reshape(-1, heads, dim)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: Group) -> Tensor:
    """One query a sequence. The G heads that share one KV head become G queries of it: nothing is repeated.

    Args:
        q: [B, K, G, D]. On a CPU bf16 becomes fp32, where SDPA takes half the time, conversion included.

    Returns:
        [B, H, D], in the dtype of q.
    """
    (batch, kv_heads, _, dim), part, dtype = q.shape, len(q), q.dtype
    if q.device.type == "cpu":
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        part = max(1, CACHED // (group.length * kv_heads * dim))
    outs = []
    for some in (slice(first, first + part) for first in range(0, batch, part)):
        k, v = (_gather(cache, group.blocks[some], group.length).to(dtype) for cache in (k_cache, v_cache))
        mask = None if group.mask is None else group.mask[some]
        outs.append(F.scaled_dot_product_attention(q[some].to(dtype), k, v, attn_mask=mask))
    return torch.cat(outs).flatten(1, 2).to(q.dtype)


def _gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The contexts in `blocks` [B, n], cut to `length` positions: a copy seen as [B, K, length, D]."""
    found = cache.flatten(1).index_select(0, blocks.flatten())
    return found.view(len(blocks), -1, *cache.shape[2:])[:, :length].transpose(1, 2)
