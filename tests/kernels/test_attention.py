"""Attention against a loop over tokens and heads in fp64."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepladder.kernels.attention import causal_attention
from stepladder.parallel.context import KVCache, PagedSequences
from tests.kernels.native_checks import spec_of


def one_query(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [H, D] over keys, values [L, K, D]: softmax(q k / sqrt(D)) v, head by head."""
    heads, dim = q.shape
    shared = heads // keys.shape[1]
    rows = []
    for head in range(heads):
        scores = (keys[:, head // shared] @ q[head]) / dim**0.5
        weights = (scores - scores.max()).exp()
        rows.append((weights / weights.sum()) @ values[:, head // shared])
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_causal_attention(heads: int, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    batch, length, dim = 3, 7, 5
    q = torch.randn(batch * length, heads, dim, dtype=torch.float64)
    k, v = torch.randn(2, batch * length, kv_heads, dim, dtype=torch.float64)
    got = causal_attention(q, k, v, batch, window)
    for row in range(batch * length):
        first = max(row - row % length, row + 1 - (window or length))
        want = one_query(q[row], k[first : row + 1], v[first : row + 1])
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-12)


def check_paged(
    shapes: list[tuple[int, int]], heads: int, kv_heads: int, block_size: int, seed: int, window: int | None = None
) -> None:
    """`shapes`: (start, length) of each sequence of one step; the positions before start are in the cache already."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-(start + length) // block_size) for start, length in shapes]
    order = random.Random(seed).sample(range(sum(needed) + 3), sum(needed) + 3)
    tables = [[order.pop() for _ in range(n)] for n in needed]
    cache = KVCache(spec_of(heads, kv_heads, 6, torch.float64), kv_heads, sum(needed) + 3, block_size)
    cache.keys.normal_(0, 30, generator=generator)  # what others left behind; it would show
    cache.values.normal_(0, 30, generator=generator)
    before = cache.keys.clone()
    contexts = [torch.randn(2, s + n, kv_heads, 6, dtype=torch.float64, generator=generator) for s, n in shapes]
    for table, (start, _), context in zip(tables, shapes, contexts, strict=True):
        for position in range(start):
            slot = table[position // block_size] * block_size + position % block_size
            cache.keys[1].flatten(0, 1)[slot] = context[0, position]
            cache.values[1].flatten(0, 1)[slot] = context[1, position]
    q = torch.randn(sum(n for _, n in shapes), heads, 6, dtype=torch.float64, generator=generator)
    k, v = (torch.cat([c[i, s:] for c, (s, _) in zip(contexts, shapes, strict=True)]) for i in (0, 1))
    step = PagedSequences(cache, [s for s, _ in shapes], [n for _, n in shapes], tables)
    got = step.attend(1, q, k, v, window)
    row = 0
    for (start, length), context in zip(shapes, contexts, strict=True):
        for position in range(start, start + length):
            first = 0 if window is None else max(0, position + 1 - window)
            want = one_query(q[row], context[0, first : position + 1], context[1, first : position + 1])
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-11)
            assert int(step.positions[row]) == position
            row += 1
    assert torch.equal(cache.keys[0], before[0]), "another layer's cache was written"
    untouched = set(range(cache.num_blocks)) - {block for table in tables for block in table}
    assert torch.equal(cache.keys[1, sorted(untouched)], before[1, sorted(untouched)]), "a free block was written"


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 13), st.sampled_from((1, 1, 2, 5))), min_size=1, max_size=5),
    st.sampled_from(((4, 4), (6, 2), (4, 1))),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from((None, 1, 2, 4, 7, 30)),
)
def test_paged_attention_of_any_ragged_batch(
    shapes: list[tuple[int, int]], heads: tuple[int, int], block_size: int, seed: int, window: int | None
) -> None:
    check_paged(shapes, *heads, block_size, seed, window)


@pytest.mark.parametrize(
    "shapes",
    [
        [(0, 9)],
        [(0, 1)],
        [(6, 1)],
        [(4, 5)],
        [(3, 1), (8, 1), (0, 1)],
        [(0, 4), (0, 4)],
        [(0, 7), (5, 1), (2, 3), (9, 1)],
    ],
    ids=["prefill", "first token", "decode", "chunk", "decode batch", "equal prefills", "mixed"],
)
@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_paged_attention_of_every_kind_of_step(
    shapes: list[tuple[int, int]], heads: int, kv_heads: int, window: int | None
) -> None:
    check_paged(shapes, heads, kv_heads, 4, seed=1, window=window)


def test_windows_share_their_groups_and_read_no_more_of_the_cache_than_they_see() -> None:
    cache = KVCache(spec_of(4, 2, 6, torch.float64), 2, 20, 4)
    step = PagedSequences(cache, [30, 8], [1, 1], [list(range(8)), list(range(8, 11))])
    assert [(group.blocks.shape, group.length) for group in step.groups(5)] == [((2, 2), 7)]
    assert [(group.blocks.shape, group.length) for group in step.groups()] == [((2, 8), 31)]
    assert step.groups(5) is step.groups(5) and step.groups(31) is step.groups()
