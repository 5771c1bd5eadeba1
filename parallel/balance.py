"""Let FFNs make up for what attention splits unevenly, so that the ranks of a group read equally many weights a layer.

Decoding is bound by memory: what a rank takes for a layer goes with the weights that it reads. It helps where ranks
meet once a layer, or a block later than they could, and is left out elsewhere (`layers.ffn_shard`).
"""

from dataclasses import replace
from itertools import pairwise

from stepladder.parallel.heads import heads_of
from stepladder.parallel.shards import ALONE, Placement, Shard
from stepladder.parallel.spec import ModelSpec

UNIT = 16  # columns that a share is rounded to, so that rows of weights begin at whole cache lines
SMALL = 32  # units per rank; below, rounding would cost more than it brings


def place_of(
    spec: ModelSpec, shard: Shard, balance: bool = False, whole_experts: bool = False, home: bool = False
) -> Placement:
    """A rank's place in the groups that share modules.

    Args:
        balance: FFNs make up for what attention splits unevenly. whole_experts: ranks hold whole experts, contiguous
            ones, in place of a part of each. home: rows live on one rank each, and FFNs are on all of them whole.

    Raises:
        ValueError: there are more ranks than heads, or than experts, or no experts at all.
    """
    if whole_experts and not spec.experts:
        raise ValueError("layout.experts is whole, but this model has no experts; leave it at split")
    place = balanced(spec, shard) if balance else Placement.of(shard)
    if home:
        place = Placement(ALONE, ALONE, shard)
    return replace(place, whole_experts=whole_experts, home=home)


def balanced(spec: ModelSpec, shard: Shard) -> Placement:
    """A rank's place, with shares of the FFN's columns that even its layers out. Equal shares where attention is even,
    and where there are experts, of which a token reads a few.

    Raises:
        ValueError: there are more ranks than heads.
    """
    attention = [_attention_weights(spec, Shard(rank, shard.size)) for rank in range(shard.size)]
    if len(set(attention)) == 1 or spec.experts:
        return Placement.of(shard)
    shares = _shares(spec.intermediate_size, [-weights / (3 * spec.hidden_size) for weights in attention])
    return Placement(shard, Shard(shard.rank, shard.size, shares), shard)


def _attention_weights(spec: ModelSpec, shard: Shard) -> int:
    """Weights of one attention module on a rank: query, key, value and output."""
    heads, h, r = heads_of(spec, shard), spec.hidden_size, spec.query_rank
    queries = len(heads.query) * spec.head_dim
    return (r * (h + queries) if r else h * queries) + h * (queries + 2 * len(heads.kv) * spec.head_dim)


def _shares(total: int, handicaps: list[float]) -> tuple[int, ...]:
    """`total` columns over ranks that are so many columns behind the others or ahead, in whole units where there are
    many; nobody gets less than one unit, even if the others could not make up for it."""
    unit = UNIT if total >= UNIT * SMALL * len(handicaps) else 1
    units, size = total // unit, len(handicaps)
    level = (total - sum(handicaps)) / size
    wanted = [max(unit, level + handicap) for handicap in handicaps]
    scale = total / sum(wanted)  # above 1 ranks that got the least they can, the others give
    ends, reached = [0], 0.0
    for want in wanted:
        reached += want * scale
        ends.append(max(ends[-1] + 1, round(reached / unit)))
    ends = [min(end, units - (size - rank)) for rank, end in enumerate(ends)]
    ends[-1] = units
    shares = [(stop - start) * unit for start, stop in pairwise(ends)]
    shares[-1] += total - units * unit
    return tuple(shares)
