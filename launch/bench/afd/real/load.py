"""The fixed work that every case does: sequences behind a filled KV cache, decoded greedily from the same tokens."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from stepladder.launch.bench.afd.real.task import Load
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.spec import ModelSpec

BLOCK_SIZE = 16


class Batch:
    """Some sequences of a load with some of its KV heads; the same keys and values whoever holds them.

    Args:
        heads: of the KV heads. which: of the sequences. native: as the rank's model has its cache.
    """

    def __init__(self, spec: ModelSpec, load: Load, heads: range, which: range, native: bool) -> None:
        self.load, self._which = load, which
        self._width = -(-(load.context + load.steps + 1) // BLOCK_SIZE)
        self.cache = KVCache(spec, len(heads), len(which) * self._width, BLOCK_SIZE, native_layout=native)
        draw = torch.Generator().manual_seed(1)
        blocks = range(which.start * self._width, which.stop * self._width)
        shape = (spec.num_layers, load.batch * self._width, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
        keys, values = (
            torch.randn(shape, generator=draw)[:, blocks.start : blocks.stop, :, heads.start : heads.stop]
            for _ in range(2)
        )
        self.cache.put(keys, values)
        tokens = torch.randint(0, spec.vocab_size, (load.batch,), generator=draw)
        self.first = tokens[which.start : which.stop]

    def contexts(self, number: int, sizes: Sequence[int]) -> list[PagedSequences]:
        """Of micro-batches of these sizes, in decode step `number`."""
        made, begin, width = [], 0, self._width
        for size in sizes:
            tables = [list(range(i * width, (i + 1) * width)) for i in range(begin, begin + size)]
            made.append(PagedSequences(self.cache, [self.load.context + number] * size, [1] * size, tables))
            begin += size
        return made


def load_spec(path: str) -> ModelSpec:
    """Of a checkpoint in fp32, with attention and FFN in blocks of their own and every lag 0. A case gives its blocks
    the lag it wants: right in time, though another model in its words where that is not the checkpoint's wiring."""
    return replace(ModelSpec.load(path), residual="standard", ladder_layers=None, dtype=torch.float32)
