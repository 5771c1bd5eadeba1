"""Rows that live on one rank of a group, and the ranks that hold their experts: out, and back as one sum for each.

Letters: T rows that live here, k experts per row, h hidden.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepladder.parallel.mesh import Mesh
from stepladder.parallel.shards import Placement, Shard

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exchange:
    """A row goes to every rank that holds one of its experts, once, however many these are; the rank adds up what its
    experts give, and the row's own rank what the ranks sent, in their order. All ranks of the group call it as often,
    with rows or without.

    Args:
        mesh: of the group. place: of this rank in it. count: of experts.
    """

    def __init__(self, mesh: Mesh, place: Placement, count: int) -> None:
        self._mesh, size = mesh, mesh.shard.size
        held = [Shard(rank, size).split(count, "the number of experts") for rank in range(size)]
        everybody = not place.whole_experts  # has a part of each
        owners = [[everybody or expert in mine for expert in range(count)] for mine in held]
        self._owners = torch.tensor(owners)  # [ranks, experts]

    def __call__(self, mix: Mix, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`mix` (x, weights, chosen) of all experts: [T, h] in the dtype of what it returns."""
        wanted = [owned[chosen].any(-1).nonzero()[:, 0] for owned in self._owners]
        going, one_each = [len(rows) for rows in wanted], [1] * len(wanted)
        coming = self._mesh.exchange(torch.tensor(going), one_each, one_each).tolist()
        mine = torch.cat([_packed((x[rows], weights[rows], chosen[rows])) for rows in wanted])
        theirs = self._mesh.exchange(mine, going, coming)
        sums = self._mesh.exchange(mix(*_unpacked(theirs, (x, weights, chosen))), coming, going)
        total = sums.new_zeros(len(x), x.shape[-1])
        for rows, part in zip(wanted, sums.split(going), strict=True):
            total[rows] += part
        return total


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors as bytes, side by side: uint8 [T, n]."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], 1)


def _unpacked(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors again; they are of the widths and dtypes of these."""
    widths = [one.shape[1] * one.element_size() for one in like]
    return [
        part.clone(memory_format=torch.contiguous_format).view(one.dtype)
        for part, one in zip(rows.split(widths, dim=1), like, strict=True)
    ]
