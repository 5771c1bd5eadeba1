"""Query, key and value, or the matrices of experts, as what they are in the checkpoint, while a model that keeps them
as one trains.

Muon orthogonalises what it is given, and a merged parameter is not one matrix but several below each other.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Sharded


class Stacked(nn.Module):
    """One parameter of a module computed as its pieces stacked along dimension 0 (torch's parametrization)."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, *pieces: Tensor) -> Tensor:
        return torch.cat(pieces)

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.split(self.rows)


class Taken(NamedTuple):
    """A merged parameter that was taken apart, and where it belongs."""

    module: nn.Module
    name: str
    parameter: Sharded


def take_apart(model: Transformer) -> list[Taken]:
    """Make every piece of every merged matrix a parameter of its own; the merged ones are given back."""
    taken = []
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Sharded) and parameter.dim() == 2 and len(parameter.pieces) > 1:
                rows = [piece.height for piece in parameter.pieces]
                parametrize.register_parametrization(module, name, Stacked(rows), unsafe=True)
                taken.append(Taken(module, name, parameter))
    return taken


@torch.no_grad()
def put_together(taken: list[Taken]) -> None:
    """Undo `take_apart` with the pieces' present values."""
    for module, name, parameter in taken:
        parameter.data = getattr(module, name).clone()
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        setattr(module, name, parameter)
