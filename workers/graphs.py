"""Decode steps as CUDA graphs. A step launches some hundred kernels, which for a small batch takes the host longer than
the device needs to run them; a graph launches them all at once.

A graph has fixed shapes and reads fixed memory. So there is one per batch size and context length, both rounded up to
powers of two, and a step is copied into its tensors. The rows that are too many all belong to one spare cache block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.parallel.context import DecodeSequences, KVCache
from stepladder.parallel.model import Transformer
from stepladder.workers.core import StepPlan

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
"""Makes of a function without arguments one that does the same to the same memory, and returns the same tensor."""

MOST_POSITIONS = 1 << 18  # of a batch's contexts together; with more to read, launching is not what takes the time


class CudaCapture:
    """Records CUDA graphs.

    All share one memory pool: they run one after another on one stream, and what one of them returns is consumed before
    the next one is launched. All reduces inside stay on NCCL's own stream, which the recording forks to and joins from.
    """

    WARM_UPS = 3  # as torch's notes on CUDA graphs have it: libraries set themselves up in the first calls

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do to the device meanwhile is not ours to forbid
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class _Recorded(NamedTuple):
    """tokens: [B]; table: [B, 1 + n], a position and the context's blocks."""

    tokens: Tensor
    table: Tensor
    replay: Replay


class DecodeGraphs:
    """Runs steps in which every sequence brings one token.

    Args:
        model, cache: of this rank. The cache's last block must belong to no sequence.
        capture: records a function.
    """

    def __init__(self, model: Transformer, cache: KVCache, capture: Capture) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._spare = cache.num_blocks - 1
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def fits(self, plan: StepPlan) -> bool:
        """Whether every sequence brings one token and wants its logits, and the contexts are not too long."""
        if len(plan.rows) != len(plan.tokens) or len(plan.starts) != len(plan.tokens):
            return False
        batch, width = _shape(plan)
        return batch * width * self._cache.block_size <= MOST_POSITIONS

    def run(self, tokens: Tensor, plan: StepPlan) -> Tensor:
        """Final hidden states [B, hidden] of a plan that fits, to be used before the next run.

        Args:
            tokens: [B] int64, the plan's, all of them known.
        """
        batch, width = _shape(plan)
        if (batch, width) not in self._recorded:
            self._recorded[batch, width] = self._record(batch, width)
        recorded, count = self._recorded[batch, width], len(plan.starts)
        table = [
            [start, *blocks, *[self._spare] * (width - len(blocks))]
            for start, blocks in zip(plan.starts, plan.block_tables, strict=True)
        ]
        table += [[0, *[self._spare] * width]] * (batch - count)
        recorded.tokens[:count].copy_(tokens)
        recorded.table.copy_(upload(table, tokens.device))
        return recorded.replay()[:count]

    def _record(self, batch: int, width: int) -> _Recorded:
        device = self._cache.device
        tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        table = torch.full((batch, 1 + width), self._spare, dtype=torch.int64, device=device)
        table[:, 0] = 0

        def step() -> Tensor:
            context = DecodeSequences(self._cache, table[:, 0], table[:, 1:])
            return self._model(tokens, context)

        return _Recorded(tokens, table, self._capture(step))


def _shape(plan: StepPlan) -> tuple[int, int]:
    """Batch size and blocks of the longest context, both rounded up."""
    return _power_of_two(len(plan.starts)), _power_of_two(max(map(len, plan.block_tables)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
