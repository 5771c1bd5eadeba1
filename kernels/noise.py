"""Random numbers that are a function of (seed, position, token) and of nothing else: not of the batch, not of the
device, not of how often a step was repeated. A replayed request draws what it would have drawn."""

import torch
from torch import Tensor

from stepladder.kernels.cpu import sampling as cpu
from stepladder.kernels.host_noise import FIRST, MASK, MULTIPLIERS, SECOND, TOKEN

_A, _B = MULTIPLIERS


def gumbel(seeds: Tensor, positions: Tensor, tokens: int | Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u): fp32 [R, tokens]. argmax(log p + noise) is a draw from p.

    A row's key has 64 bits: no two seeds share one at the same position, no two positions at the same seed.

    Args:
        seeds, positions: int64 [R].
        tokens: of a vocabulary the first so many, or these, int64 [V].
    """
    first, second = _keys(seeds, positions)
    which = torch.arange(tokens, device=first.device) if isinstance(tokens, int) else tokens
    token = _mix(which + TOKEN)
    u = (_mix(token ^ first[:, None], second[:, None]).double() + 0.5) / 2**32
    return -torch.log(-torch.log(u)).float()


def draw(
    scores: Tensor, seeds: Tensor, positions: Tensor, tokens: Tensor | None = None, native: bool = False
) -> Tensor:
    """argmax(scores + noise), a draw from softmax(scores) for every row: columns, int64 [R].

    Args:
        scores: fp32 [R, V], of `tokens` [V], or of the first V of a vocabulary. seeds, positions: int64 [R].
        native: with the kernels of CPU ranks, which compute the noise of few tokens; what is drawn is the same.
    """
    if not native:
        return (scores + gumbel(seeds, positions, scores.shape[-1] if tokens is None else tokens)).argmax(-1)
    columns, clear = cpu.draw(scores, tokens, seeds, positions)
    return columns if clear else torch.where(columns < 0, draw(scores, seeds, positions, tokens), columns)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """In (0, 1), independent of the Gumbel noise of the same seed and position: fp32 [R]; int64 [R] both."""
    first, second = _keys(seeds, positions)
    bits = _mix(_mix(first ^ 0x6A09E667, second) ^ second)
    return ((bits >> 8).float() + 0.5) / 2**24


def _keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Two lanes of 32 bits each, int64 [R]. A seed becomes (s, t) by two rounds of a Feistel network, which can be
    undone; then every lane is mixed with the position on its own."""
    low, high = seeds & MASK, (seeds >> 32) & MASK
    s = _mix(_mix(low) ^ high)
    t = _mix(s ^ low)
    return _mix(s ^ _mix(positions + FIRST)), _mix(t ^ _mix(positions + SECOND))


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """A 32-bit finaliser with low bias (C. Wellons, "Prospecting for Hash Functions", lowbias32), in int64. A key
    enters between its two multiplications."""
    x = x & MASK
    x = (x ^ (x >> 16)).mul_(_A).bitwise_and_(MASK).bitwise_xor_(key)
    x = (x ^ (x >> 15)).mul_(_B).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16)
