"""What the modules of a step need besides the stream: rotary tables, and attention over this step's contexts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from stepladder.kernels.attention import Group, causal_attention, paged_attention, visible
from stepladder.kernels.transfer import upload
from stepladder.parallel.spec import ModelSpec


class Context(Protocol):
    """positions: [tokens] int64, each token's place in its own sequence; cos, sin: set by the model."""

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of q [tokens, heads, head_dim] over each token's own context, or its last `window` positions:
        same shape as q."""
        ...


class WholeSequences:
    """`batch` sequences of equal length from position 0, without a cache: training and the tests' reference."""

    cos: Tensor
    sin: Tensor

    def __init__(self, batch: int, length: int, device: torch.device | str = "cpu") -> None:
        self.batch = batch
        self.positions = torch.arange(length, device=device).repeat(batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        return causal_attention(q, k, v, self.batch, window)


class KVCache:
    """Keys and values of every layer of this rank, in blocks of `block_size` tokens.

    keys, values: [layers, num_blocks, block_size, kv_heads, head_dim]
    """

    def __init__(
        self, spec: ModelSpec, kv_heads: int, num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (spec.num_layers, num_blocks, block_size, kv_heads, spec.head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.keys = torch.zeros(shape, dtype=spec.dtype, device=device)
        self.values = torch.zeros(shape, dtype=spec.dtype, device=device)


class _Paged(ABC):
    """A step over the paged cache, in general. Subclasses say which slots it writes, and which contexts it reads.

    Args:
        longest: no context has more positions.
        exact: round attention independently of the batch; see `paged_attention`.

    Attributes:
        slots: [tokens] int64, where the cache takes each token's key and value.
    """

    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, cache: KVCache, longest: int, exact: bool = False) -> None:
        self.cache, self._longest, self._exact = cache, longest, exact
        self._groups: dict[int | None, list[Group]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.flatten(0, 1)[self.slots] = k
        values.flatten(0, 1)[self.slots] = v
        return paged_attention(q, keys, values, self.groups(window), self._exact)

    def groups(self, window: int | None = None) -> list[Group]:
        """Built for the first layer that has this window, shared by all that do."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._groups:
            self._groups[window] = self._build(window)
        return self._groups[window]

    @abstractmethod
    def _build(self, window: int | None) -> list[Group]:
        """The sequences to attend over, by equal shapes."""


class PagedSequences(_Paged):
    """A ragged batch over the paged cache; built once per step, shared by every layer.

    Args:
        cache: this rank's KV cache.
        starts: for each sequence, the position of its first token in this step.
        lengths: for each sequence, how many tokens it brings.
        block_tables: for each sequence, the cache blocks of its context, including this step's tokens.
        exact: round attention independently of the batch; see `paged_attention`.
    """

    def __init__(
        self,
        cache: KVCache,
        starts: Sequence[int],
        lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        exact: bool = False,
    ) -> None:
        self._spans = [range(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        super().__init__(cache, max((span.stop for span in self._spans), default=0), exact)
        self._tables, size = block_tables, cache.block_size
        self.positions = self._tensor([p for span in self._spans for p in span])
        self.slots = self._tensor(
            [t[p // size] * size + p % size for t, span in zip(block_tables, self._spans, strict=True) for p in span]
        )

    def _tensor(self, values: list[Any]) -> Tensor:
        return upload(values, self.cache.device)

    def _build(self, window: int | None) -> list[Group]:
        by_length: dict[int, list[int]] = {}
        for index, span in enumerate(self._spans):
            by_length.setdefault(len(span), []).append(index)
        return [self._group(members, window) for members in by_length.values()]

    def _group(self, members: list[int], window: int | None) -> Group:
        """Of the sequences `members`, which bring equally many tokens."""
        size, spans = self.cache.block_size, [self._spans[i] for i in members]
        first = [0 if window is None else max(0, span.start - window + 1) // size for span in spans]
        context = max(span.stop - f * size for span, f in zip(spans, first, strict=True))
        width = -(-context // size)
        blocks = [
            [*self._tables[i][f : -(-span.stop // size)]] for i, span, f in zip(members, spans, first, strict=True)
        ]
        lone, sees_all = len(members) == 1, window is None or window >= context
        causal = lone and sees_all and len(spans[0]) == context > 1
        mask = None
        if not causal and not (lone and sees_all and len(spans[0]) == 1):
            places = self._tensor([[p - f * size for p in span] for span, f in zip(spans, first, strict=True)])
            mask = visible(places[:, None], context, window)
        ends = [0, *accumulate(len(span) for span in self._spans)]
        rows = [row for i in members for row in range(ends[i], ends[i + 1])]
        padded = [listed + [0] * (width - len(listed)) for listed in blocks]
        return Group(self._tensor(rows), self._tensor(padded), context, mask, causal)


class DecodeSequences(_Paged):
    """A batch that brings one token per sequence, in tensors of fixed shape. Nothing here is read on the host, so that
    a CUDA graph can hold all of it, and serves every batch that is written into the same tensors.

    Args:
        cache: this rank's KV cache.
        positions: [B] int64.
        blocks: [B, n] int64, the cache blocks of each context; what stands behind a context is not looked at.
    """

    def __init__(self, cache: KVCache, positions: Tensor, blocks: Tensor) -> None:
        size = cache.block_size
        super().__init__(cache, blocks.shape[1] * size)
        self.positions, self._blocks = positions, blocks
        block = blocks.gather(1, (positions // size)[:, None])[:, 0]
        self.slots = block * size + positions % size

    def _build(self, window: int | None) -> list[Group]:
        """One group; a window is only masked, since where it begins is not known here."""
        rows = torch.arange(len(self._blocks), device=self._blocks.device)
        mask = visible(self.positions[:, None, None], self._longest, window)
        return [Group(rows, self._blocks, self._longest, mask, causal=False)]
