"""Random numbers that are a function of (seed, position, token) and of nothing else: not of the batch, not of the
device, not of how often a step was repeated. A replayed request draws what it would have drawn."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, -log(-log u): fp32 [R, vocab_size]. argmax(log p + noise) is a draw from p.

    Args:
        seeds, positions: int64 [R].
    """
    key = _mix(_mix(seeds & _MASK) ^ ((seeds >> 32) & _MASK))
    key = _mix(key ^ _mix(positions + 0x9E3779B9))[:, None]
    token = torch.arange(vocab_size, device=seeds.device)
    bits = _mix(_mix(token + 0x85EBCA6B) ^ key)
    u = (bits.double() + 0.5) / 2**32
    return -torch.log(-torch.log(u)).float()


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser with low bias (C. Wellons, "Prospecting for Hash Functions", lowbias32), in int64."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
