"""Attention of a CPU rank over its cache's blocks, beside that of plain torch, which gathers and pads."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.kernels.attention import paged_attention
from stepladder.launch.bench.engine.turns import medians
from stepladder.launch.report import Goal, Row, at_least
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.spec import ModelSpec

BLOCK = 16


class Step(NamedTuple):
    """What each sequence has in the cache already, and what it brings; how many times faster than torch it is to be."""

    name: str
    starts: Sequence[int]
    lengths: Sequence[int]
    goal: float


STEPS = (
    Step("prefill of 1,000", [0], [1000], 1.1),
    Step("prefill of 512 at 3,488", [3488], [512], 1.1),
    Step("decode 1 at 4,000", [4000], [1], 2.5),
    Step("decode 16 at 100", [100] * 16, [1] * 16, 2.5),
    Step("decode 16 at 600", [600] * 16, [1] * 16, 2.5),
    Step("decode 32 at 16 to 977", range(16, 1008, 31), [1] * 32, 2.5),
    Step("prefills of 200 and 100, 14 decodes", [0, 300, *range(50, 750, 50)], [200, 100] + [1] * 14, 2.5),
    Step("verification, 4 x 6 at 500", [500] * 4, [6] * 4, 2.5),
)


@torch.inference_mode()
def measure(spec: ModelSpec, scale: float, repeats: int) -> tuple[list[Row], dict[str, Goal]]:
    """One layer with the heads of `spec`, in fp32; positions and lengths are multiplied by `scale`."""
    layer = replace(spec, num_layers=1, windows=(), residual="standard", ladder_layers=None, dtype=torch.float32)
    rows, summary = [], {}
    for step in STEPS:
        starts, lengths = ([round(n * scale) for n in step.starts], [max(1, round(n * scale)) for n in step.lengths])
        own, plain = medians(ways(layer, starts, lengths), 3 * repeats)
        rows.append(Row(f"attention, {step.name}", "time of a layer", own * 1e3, "ms", rival=plain * 1e3))
        summary[f"attention, {step.name}: plain torch / ours"] = at_least(plain / own, step.goal)
    return rows, summary


def ways(spec: ModelSpec, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Callable[[], Tensor], ...]:
    """Ours [T, H D] and torch's [T, H, D], over the same random contexts, whose blocks are shuffled."""
    sizes = [-(-(start + length) // BLOCK) for start, length in zip(starts, lengths, strict=True)]
    order = iter(torch.randperm(sum(sizes)).tolist())
    tables = [[next(order) for _ in range(size)] for size in sizes]
    shape = 1, sum(sizes), BLOCK, spec.num_kv_heads, spec.head_dim
    laid_out, plain = (KVCache(spec, spec.num_kv_heads, sum(sizes), BLOCK, native_layout=on) for on in (True, False))
    keys, values = torch.randn(shape), torch.randn(shape)
    laid_out.put(keys, values)
    plain.put(keys, values)
    q = torch.randn(sum(lengths), spec.num_heads, spec.head_dim)
    own, theirs = (PagedSequences(cache, starts, lengths, tables) for cache in (laid_out, plain))
    groups = theirs.groups()
    return (
        lambda: own.attend_pages(0, q, None),
        lambda: paged_attention(q, plain.keys[0], plain.values[0], groups),
    )
