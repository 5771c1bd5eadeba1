"""Random numbers that are a function of (seed, position, token) and of nothing else: not of the batch, not of the
device, not of how often a step was repeated. A replayed request draws what it would have drawn."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_A, _B = 0x7FEB352D, 0x846CA68B


def gumbel(seeds: Tensor, positions: Tensor, tokens: int | Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u): fp32 [R, tokens]. argmax(log p + noise) is a draw from p.

    A row's key has 64 bits: no two seeds share one at the same position, no two positions at the same seed.

    Args:
        seeds, positions: int64 [R].
        tokens: of a vocabulary the first so many, or these, int64 [V].
    """
    first, second = _keys(seeds, positions)
    which = torch.arange(tokens, device=seeds.device) if isinstance(tokens, int) else tokens
    token = _mix(which + 0x85EBCA6B)
    u = (_mix(token ^ first[:, None], second[:, None]).double() + 0.5) / 2**32
    return -torch.log(-torch.log(u)).float()


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """In (0, 1), independent of the Gumbel noise of the same seed and position: fp32 [R]; int64 [R] both."""
    first, second = _keys(seeds, positions)
    bits = _mix(_mix(first ^ 0x6A09E667, second) ^ second)
    return ((bits >> 8).float() + 0.5) / 2**24


def _keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Two lanes of 32 bits each, int64 [R]. A seed becomes (s, t) by two rounds of a Feistel network, which can be
    undone; then every lane is mixed with the position on its own."""
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    s = _mix(_mix(low) ^ high)
    t = _mix(s ^ low)
    return _mix(s ^ _mix(positions + 0x9E3779B9)), _mix(t ^ _mix(positions + 0xC2B2AE35))


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """A 32-bit finaliser with low bias (C. Wellons, "Prospecting for Hash Functions", lowbias32), in int64. A key
    enters between its two multiplications."""
    x = x & _MASK
    x = (x ^ (x >> 16)).mul_(_A).bitwise_and_(_MASK).bitwise_xor_(key)
    x = (x ^ (x >> 15)).mul_(_B).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)
