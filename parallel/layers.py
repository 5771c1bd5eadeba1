"""The registry: which module sits at which seat of which layer, and which pool of ranks computes it."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from stepladder.parallel.modules import Attention, FactoredAttention, FeedForward
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.parallel.residual import Block
from stepladder.parallel.shards import Placement, Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import ATTENTION, FFN, SEATS, wiring

POOLS = SEATS  # a pool has the name of the seat that it was made for


class Kind(NamedTuple):
    """A kind of module. build: one rank's part of it, in that layer. pool: who computes it where pools are apart."""

    build: Callable[[ModelSpec, int, Placement], nn.Module]
    pool: str


def ffn_shard(spec: ModelSpec, layer: int, place: Placement) -> Shard:
    """Shares that make up for attention help where a rank that is done with the one begins the other at once. In the
    standard wiring all ranks wait for each module's slowest: there nothing but equal shares will do."""
    fused = spec.residual.endswith("parallel")
    return place.ffn if fused or spec.is_ladder(layer) else place.ffn.equal


KINDS = {
    "attention": Kind(lambda spec, layer, place: Attention(spec, layer, place.attention), ATTENTION),
    "mfa": Kind(lambda spec, layer, place: FactoredAttention(spec, layer, place.attention), ATTENTION),
    "moe": Kind(MixtureOfExperts, FFN),
    "ffn": Kind(lambda spec, layer, place: FeedForward(spec, layer, ffn_shard(spec, layer, place)), FFN),
}


def kind_at(spec: ModelSpec, layer: int, seat: str) -> Kind:
    """What sits at this seat of this layer."""
    if seat == FFN and spec.experts and layer in spec.experts.layers:
        return KINDS["moe"]
    if seat == ATTENTION and spec.query_rank:
        return KINDS["mfa"]
    return KINDS[seat]


def build_blocks(spec: ModelSpec, placement: Placement, pools: Collection[str] = POOLS) -> list[Block]:
    """All blocks of the model, first to last, with the modules that `pools` compute; the rest is elsewhere."""
    blocks = []
    for plan in wiring(spec):
        kinds = [kind_at(spec, plan.layer, seat) for seat in plan.seats]
        here = [kind.build(spec, plan.layer, placement) for kind in kinds if kind.pool in pools]
        elsewhere = sorted({kind.pool for kind in kinds} - set(pools))
        blocks.append(Block(plan.lag, here, elsewhere, plan.layer, plan.seats))
    return blocks
