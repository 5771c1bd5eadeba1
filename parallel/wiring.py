"""From a checkpoint's `residual` to the list of blocks; the wiring *is* that list.

standard          [attention] lag 0, [ffn] lag 0
ladder            [attention] lag 1, [ffn] lag 1      (Zhang et al. 2501.06589)
parallel          [attention, ffn] lag 0              (PaLM, 2204.02311 §2)
ladder-parallel   [attention, ffn] lag 1
hybrid            `ladder_layers` of a ladder wiring have lag 1, the other layers lag 0
"""

from typing import NamedTuple

from stepladder.parallel.spec import ModelSpec


class BlockPlan(NamedTuple):
    """One block before it has weights: which modules of which layer, and how stale the stream they read."""

    layer: int
    modules: tuple[str, ...]
    lag: int


def wiring(spec: ModelSpec) -> list[BlockPlan]:
    """The blocks of a model, first to last. The lag rises by at most 1 from one block to the next."""
    fused = spec.residual.endswith("parallel")
    groups = (("attention", "ffn"),) if fused else (("attention",), ("ffn",))
    return [
        BlockPlan(layer, modules, int(spec.is_ladder(layer))) for layer in range(spec.num_layers) for modules in groups
    ]
