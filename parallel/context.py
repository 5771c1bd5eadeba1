"""What the modules of a step need besides the stream: rotary tables, and attention over this step's contexts."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import Group, causal_attention, paged_attention, visible
from parallel.spec import ModelSpec


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

    keys, values: [layers, num_blocks * block_size, kv_heads, head_dim]
    """

    def __init__(
        self, spec: ModelSpec, kv_heads: int, num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (spec.num_layers, num_blocks * block_size, kv_heads, spec.head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.keys = torch.zeros(shape, dtype=spec.dtype, device=device)
        self.values = torch.zeros(shape, dtype=spec.dtype, device=device)


class PagedSequences:
    """A ragged batch over the paged cache; built once per step, shared by every layer.

    Args:
        cache: this rank's KV cache.
        starts: for each sequence, the position of its first token in this step.
        lengths: for each sequence, how many tokens it brings.
        block_tables: for each sequence, the cache blocks of its context, including this step's tokens.
        exact: round attention independently of the batch; see `paged_attention`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        cache: KVCache,
        starts: Sequence[int],
        lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        exact: bool = False,
    ) -> None:
        self.cache, self._exact = cache, exact
        self.device = cache.keys.device
        self._contexts = [
            _slots(table, s + n, cache.block_size) for s, n, table in zip(starts, lengths, block_tables, strict=True)
        ]
        self._positions = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        self._longest = max((len(context) for context in self._contexts), default=0)
        self._groups: dict[int | None, list[Group]] = {}
        self.positions = torch.cat(self._positions).to(self.device)
        self.slots = torch.cat([c[s:] for c, s in zip(self._contexts, starts, strict=True)]).to(self.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots] = k
        values[self.slots] = v
        return paged_attention(q, keys, values, self.groups(window), self._exact)

    def groups(self, window: int | None = None) -> list[Group]:
        """Built for the first layer that has this window, shared by all that do."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._groups:
            self._groups[window] = self._build(window)
        return self._groups[window]

    def _build(self, window: int | None) -> list[Group]:
        by_length: dict[int, list[int]] = {}
        for index, p in enumerate(self._positions):
            by_length.setdefault(len(p), []).append(index)
        ends = torch.tensor([len(p) for p in self._positions]).cumsum(0).tolist()
        first = [0 if window is None else max(0, int(p[0]) - window + 1) for p in self._positions]
        groups = []
        for length, members in by_length.items():
            rows = torch.cat([torch.arange(ends[i] - length, ends[i]) for i in members])
            slots = torch.nn.utils.rnn.pad_sequence([self._contexts[i][first[i] :] for i in members], batch_first=True)
            positions = torch.stack([self._positions[i] - first[i] for i in members])
            groups.append(self._group(rows, slots, positions, window))
        return groups

    def _group(self, rows: Tensor, slots: Tensor, positions: Tensor, window: int | None) -> Group:
        """`positions`: [B, q] places of the queries among the slots."""
        (batch, length), context = positions.shape, slots.shape[1]
        causal = batch == 1 and length == context > 1 and (window is None or window >= context)
        mask = None
        if not causal and not (batch == 1 and length == 1):
            mask = visible(positions[:, None], context, window).to(self.device)
        return Group(rows.to(self.device), slots.to(self.device), mask, causal)


def _slots(table: Sequence[int], length: int, block_size: int) -> Tensor:
    """Cache slots of the positions 0..length-1 of a sequence: int64 [length]."""
    starts = torch.tensor(table, dtype=torch.int64)[:, None] * block_size
    return (starts + torch.arange(block_size)).view(-1)[:length]
