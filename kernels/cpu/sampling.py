"""Draws on CPU ranks, which compute the noise of those tokens alone that may win.

Letters: R rows, V tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stepladder.kernels.cpu.native import ops


class Sampled(NamedTuple):
    """columns: int64 [R], as `draw` gives them. shares: fp32 [R], the largest number of softmax(logits), 0 where one is
    no number; empty, if nobody asked. clear: whether no column is -1."""

    columns: Tensor
    shares: Tensor
    clear: bool


def draw(scores: Tensor, tokens: Tensor | None, seeds: Tensor, positions: Tensor) -> tuple[Tensor, bool]:
    """`kernels.noise.draw` where that is clear: int64 [R], -1 in rows where a score is no number, or where two tokens
    come so close that how their noise is rounded decides; and whether there is no such row.

    Args:
        scores: fp32 [R, V], of `tokens` [V], or of the first V tokens. seeds, positions: int64 [R].
    """
    return ops().draw(scores.contiguous(), tokens, seeds, positions)


def sample(
    logits: Tensor,
    tokens: Tensor | None,
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
    shares: bool = False,
) -> Sampled:
    """The same from softmax(logits / temperature), and at temperature 0 the likeliest, the first of equals.

    Args:
        logits: fp32 [R, V]. temperatures, seeds, positions: one per row.
        shares: whether to tell these, too.
    """
    return Sampled(*ops().sample(logits.contiguous(), tokens, temperatures, seeds, positions, shares))
