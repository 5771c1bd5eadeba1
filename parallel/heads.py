"""Which heads of attention a rank computes. No number of heads has to be divisible by the number of ranks.

Every query head of a rank attends to a KV head of the same rank, and all KV heads of a rank have equally many query
heads there, as the kernels want it.
"""

from typing import NamedTuple

from stepladder.parallel.shards import Shard, equal_shares
from stepladder.parallel.spec import ModelSpec


class Heads(NamedTuple):
    """This rank's query heads, and the KV heads that they attend to."""

    query: range
    kv: range


def heads_of(spec: ModelSpec, shard: Shard) -> Heads:
    """Whole KV groups (a KV head with its query heads), as evenly as their number allows; with fewer KV heads than
    ranks, one KV head each, which ranks side by side hold copies of and whose query heads they share.

    Raises:
        ValueError: a rank would have no query head.
    """
    group = spec.num_heads // spec.num_kv_heads
    if spec.num_kv_heads >= shard.size:
        kv = Shard(shard.rank, shard.size).split(spec.num_kv_heads, "num_key_value_heads")
        return Heads(range(kv.start * group, kv.stop * group), kv)
    copies, first = equal_shares(shard.size, spec.num_kv_heads), 0
    if group < copies[0]:
        raise ValueError(
            f"num_attention_heads is {spec.num_heads}, {group} for each of {spec.num_kv_heads} KV heads, which "
            f"{shard.size} tensor-parallel ranks cannot share; lower layout.tp"
        )
    head = 0
    while shard.rank >= first + copies[head]:
        first, head = first + copies[head], head + 1
    part = Shard(shard.rank - first, copies[head]).split(group, "query heads of a KV head")
    return Heads(range(head * group + part.start, head * group + part.stop), range(head, head + 1))
