"""From a checkpoint's `residual` to the list of blocks; the wiring *is* that list.

standard          [attention] lag 0, [ffn] lag 0
ladder            [attention] lag 1, [ffn] lag 1      (Zhang et al. 2501.06589)
parallel          [attention, ffn] lag 0              (PaLM, 2204.02311 §2)
ladder-parallel   [attention, ffn] lag 1
hybrid            `ladder_layers` of a ladder wiring have lag 1, the other layers lag 0
"""

from typing import NamedTuple

from stepladder.parallel.spec import ModelSpec

ATTENTION, FFN = "attention", "ffn"
SEATS = (ATTENTION, FFN)  # of a layer; at each sits a module, and each has its pool of ranks where pools are apart


class BlockPlan(NamedTuple):
    """One block before it has weights: which seats of which layer, and how stale the stream that is read there."""

    layer: int
    seats: tuple[str, ...]
    lag: int


def wiring(spec: ModelSpec) -> list[BlockPlan]:
    """The blocks of a model, first to last. The lag rises by at most 1 from one block to the next."""
    fused = spec.residual.endswith("parallel")
    groups = (SEATS,) if fused else ((ATTENTION,), (FFN,))
    return [BlockPlan(layer, seats, int(spec.is_ladder(layer))) for layer in range(spec.num_layers) for seats in groups]
