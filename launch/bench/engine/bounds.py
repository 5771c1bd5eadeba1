"""What an engine's own steps would take if they were matrix products alone, or only read the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # between them times are interpolated
PROBE = 1 << 27  # elements that are read to see how fast this machine reads: 512 MB, more than any cache


@dataclass(frozen=True)
class Products:
    """Of a model's blocks, and of its head: seconds at each number of `ROWS`, and bytes of weights."""

    blocks: list[float]
    head: list[float]
    blocks_bytes: int
    head_bytes: int

    def seconds(self, steps: Sequence[Sequence[int]]) -> float:
        """steps: [rows, rows that logits are wanted of, how many such steps]."""
        return sum(count * (_at(rows, self.blocks) + _at(wanted, self.head)) for rows, wanted, count in steps)

    def bytes_read(self, steps: Sequence[Sequence[int]]) -> int:
        """Each weight once a step."""
        return sum(count * (self.blocks_bytes + bool(wanted) * self.head_bytes) for _, wanted, count in steps)


def _at(rows: int, seconds: Sequence[float]) -> float:
    return float(np.interp(rows, ROWS, seconds)) if rows else 0.0


def read_bandwidth(repeats: int = 10) -> float:
    """Bytes a second that torch's threads read at best: a sum, the fastest reader of those that torch has."""
    probe = torch.ones(PROBE)
    best = float("inf")
    for _ in range(repeats):
        began = perf_counter()
        probe.sum()
        best = min(best, perf_counter() - began)
    return probe.nbytes / best
