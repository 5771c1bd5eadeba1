"""What the modules of a step need besides the stream: rotary tables, and attention over this step's contexts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepladder.kernels.attention import Group, causal_attention, paged_attention, visible
from stepladder.kernels.cpu import native
from stepladder.kernels.rope import rope_table
from stepladder.kernels.transfer import upload
from stepladder.parallel.spec import ModelSpec

if TYPE_CHECKING:
    from stepladder.parallel.modules import Attention


class Context(ABC):
    """positions: [tokens] int64, each token's place in its own sequence; cos, sin: of their angles."""

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def take_angles(self, spec: ModelSpec, frequencies: Tensor, dtype: torch.dtype) -> None:
        """The model is about to turn queries and keys by these frequencies."""
        factor = spec.rope_scaling.attention_factor if spec.rope_scaling else 1.0
        self.cos, self.sin = self._angles(frequencies, dtype, spec.rope_interleaved, factor)

    def _angles(
        self, frequencies: Tensor, dtype: torch.dtype, interleaved: bool, factor: float
    ) -> tuple[Tensor, Tensor]:
        return rope_table(self.positions, frequencies, dtype, interleaved, factor)

    def mix(self, seat: Attention, qkv: Tensor) -> Tensor:
        """Attention of one layer, from its queries, keys and values [tokens, (H + 2 K) D]: [tokens, H D]."""
        q, k, v = seat.rotated(qkv, self.cos, self.sin)
        return self.attend(seat.layer, q, k, v, seat.window).flatten(1)

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of q [tokens, heads, head_dim] over each token's own context, or its last `window` positions:
        same shape as q."""


class WholeSequences(Context):
    """`batch` sequences of equal length from position 0, without a cache: training and the tests' reference."""

    def __init__(self, batch: int, length: int, device: torch.device | str = "cpu") -> None:
        self.batch = batch
        self.positions = torch.arange(length, device=device).repeat(batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        return causal_attention(q, k, v, self.batch, window)


class KVCache:
    """Keys and values of every layer of this rank, in blocks of `block_size` tokens.

    keys, values: [layers, num_blocks, block_size, kv_heads, head_dim]; if native, as `kernels/cpu/native.py` lays them
    out for the kernels of CPU ranks.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kv_heads: int,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        native_layout: bool = False,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.native = native_layout
        shape = (spec.num_layers, num_blocks, block_size, kv_heads, spec.head_dim)
        plain = torch.empty(shape, dtype=spec.dtype, device="meta")
        laid_out = (native.lay_out_keys(plain), native.lay_out_values(plain)) if native_layout else (plain, plain)
        self.keys, self.values = (torch.zeros(like.shape, dtype=spec.dtype, device=device) for like in laid_out)

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Fill it whole: [layers, num_blocks, block_size, kv_heads, head_dim] each."""
        if self.native:
            keys, values = native.lay_out_keys(keys), native.lay_out_values(values)
        self.keys.copy_(keys)
        self.values.copy_(values)


class _Paged(Context):
    """A step over the paged cache, in general. Subclasses say which slots it writes, and which contexts it reads.

    Args:
        longest: no context has more positions.

    Attributes:
        slots: [tokens] int64, where the cache takes each token's key and value.
    """

    slots: Tensor

    def __init__(self, cache: KVCache, longest: int) -> None:
        self.cache, self._longest = cache, longest
        self._groups: dict[int | None, list[Group]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.flatten(0, 1)[self.slots] = k
        values.flatten(0, 1)[self.slots] = v
        return paged_attention(q, keys, values, self.groups(window))

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
    """

    def __init__(
        self,
        cache: KVCache,
        starts: Sequence[int],
        lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
    ) -> None:
        self._spans = [range(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        super().__init__(cache, max((span.stop for span in self._spans), default=0))
        self._tables, size = block_tables, cache.block_size
        self.positions = self._tensor([p for span in self._spans for p in span])
        self.slots = self._tensor(
            [t[p // size] * size + p % size for t, span in zip(block_tables, self._spans, strict=True) for p in span]
        )
        if cache.native:
            width = max(map(len, block_tables), default=0)
            self._first = self._tensor([0, *accumulate(map(len, self._spans))])
            self._padded = self._tensor([[*table, *[0] * (width - len(table))] for table in block_tables])

    def _angles(
        self, frequencies: Tensor, dtype: torch.dtype, interleaved: bool, factor: float
    ) -> tuple[Tensor, Tensor]:
        if not self.cache.native:
            return super()._angles(frequencies, dtype, interleaved, factor)
        return native.rope_table(self.positions, frequencies, interleaved, factor)

    def mix(self, seat: Attention, qkv: Tensor) -> Tensor:
        if not self.cache.native:
            return super().mix(seat, qkv)
        keys, values = self.cache.keys[seat.layer], self.cache.values[seat.layer]
        q = seat.rotate_and_store(qkv, self.cos, self.sin, self.slots, keys, values)
        return self.attend_pages(seat.layer, q, seat.window)

    def attend_pages(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """Attention of q [tokens, heads, head_dim] over what a native cache holds of each context: [tokens, H D]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return native.attend(q, keys, values, self._first, self.positions, self._padded, window)

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
