"""The cell of a recurrent drafter on CPU ranks, in two products; `RecurrentHead` defines it.

Letters: N rows, H hidden size, I inner size of the cell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.kernels.cpu.native import Projection, ops


@dataclass(frozen=True)
class RecurrentCell:
    """x = [rms(state), rms(embedded)], next = L x + O (silu(A x) * G x).

    Attributes:
        gated: A and G, [2 I, 2 H]. out: O and L side by side, [H, I + 2 H].
    """

    gated: Projection
    out: Projection

    @staticmethod
    def of(gate: Tensor, up: Tensor, linear: Tensor, down: Tensor) -> "RecurrentCell":
        """A, G [I, 2 H], L [H, 2 H] and O [H, I], of one dtype."""
        gated = Projection.of(torch.cat((gate, up)), gated=True, dtype=torch.float32)
        return RecurrentCell(gated, Projection.of(torch.cat((down, linear), 1), dtype=torch.float32))

    def __call__(self, state: Tensor, embedded: Tensor) -> Tensor:
        """fp32 [N, H] twice -> [N, H]."""
        return ops().advance(state, embedded, self.gated.panels, self.gated.outputs, self.out.panels)
