"""The experts of a layer on CPU ranks: `kernels.moe.mix` in one operator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.kernels.cpu.native import Projection, ops


@dataclass(frozen=True)
class Experts:
    """SwiGLU networks side by side.

    Letters: T tokens, k experts per token, n experts, h hidden, I inner size.

    Attributes:
        gate_up, down: panels of each expert's matrices, as in `Projection`: [n, 2 I / 64, h, 64], [n, h / 64, I, 64].
        inner: I. first: the number of the first of them.
    """

    gate_up: Tensor
    down: Tensor
    inner: int
    first: int = 0

    @staticmethod
    def of(gate_up: Tensor, down: Tensor, count: int, first: int = 0) -> "Experts":
        """Matrices of `count` experts below each other: [n 2 I, h], gates first, and [n h, I]."""
        both, out = (part.view(count, -1, part.shape[-1]) for part in (gate_up, down))
        gates, outputs = (
            torch.stack([Projection.of(each, gated=gated).panels for each in some])
            for some, gated in ((both, True), (out, False))
        )
        return Experts(gates, outputs, down.shape[-1], first)

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What these experts add to each token: [T, h] and, as `route` gives them, [T, k] twice -> fp32 [T, h]."""
        return ops().mix_experts(x, weights, chosen, self.gate_up, self.down, self.inner, self.first)
