"""Attention in plain torch: over a paged KV cache for serving, over whole sequences for training.

Letters: T tokens of the step, H query heads, K KV heads, G = H / K, D head dim, S slots of the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The sequences of a step that bring equally many query tokens, padded to the longest context among them.

    The context of a layer with a sliding window begins at the first position that any of the queries sees.

    rows: [B * q] rows of the step's tokens; slots: [B, L] cache slots of each context, 0 where padded;
    mask: bool [B, 1, q, L], True where a query may look, or None where every slot is visible to every query;
    causal: q == L and B == 1, so that SDPA's own causal mask does it.
    """

    rows: Tensor
    slots: Tensor
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


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: list[Group], exact: bool = False) -> Tensor:
    """Attention of a ragged batch over its cached contexts, which already hold this step's keys and values.

    Args:
        q: [T, H, D].
        k_cache, v_cache: [S, K, D].
        groups: cover every row of q exactly once.
        exact: compute in fp64 and round once at the end. SDPA adds up in an order that depends on the shape of the
            batch; what is left of that after the rounding is nothing, but for one row in many millions.

    Returns:
        [T, H, D]
    """
    if len(groups) == 1:  # the common step, all decode or one prefill: rows are in order already
        return _attend(q, k_cache, v_cache, groups[0], exact)
    out = torch.empty_like(q)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], k_cache, v_cache, group, exact)
    return out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: Group, exact: bool) -> Tensor:
    (batch, context), (_, heads, dim), kv_heads = group.slots.shape, q.shape, k_cache.shape[1]
    slots = group.slots.view(-1)
    k = k_cache.index_select(0, slots).view(batch, context, kv_heads, dim).transpose(1, 2)
    v = v_cache.index_select(0, slots).view(batch, context, kv_heads, dim).transpose(1, 2)
    dtype, length = q.dtype, q.shape[0] // batch
    if exact:
        q, k, v = q.double(), k.double(), v.double()
    if length == 1:  # the G heads that share one KV head become G queries of it: nothing is repeated
        q = q.view(batch, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).reshape(batch, heads, dim).to(dtype)
    q = q.view(batch, length, heads, dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=group.mask, is_causal=group.causal, enable_gqa=heads != kv_heads
    )
    return out.transpose(1, 2).reshape(-1, heads, dim).to(dtype)
