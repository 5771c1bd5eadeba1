"""`kernels/noise.py` for a few tokens, on the host and without torch; what both have in common."""

import math
from collections.abc import Iterable

MASK = 0xFFFFFFFF
MULTIPLIERS = 0x7FEB352D, 0x846CA68B
TOKEN, FIRST, SECOND = 0x85EBCA6B, 0x9E3779B9, 0xC2B2AE35  # what tokens and positions are moved by


def gumbel_of(seed: int, position: int, tokens: Iterable[int]) -> list[float]:
    """`noise.gumbel` of one key, up to rounding."""
    low, high = seed & MASK, (seed >> 32) & MASK
    s = _mix(_mix(low) ^ high)
    t = _mix(s ^ low)
    first, second = _mix(s ^ _mix(position + FIRST)), _mix(t ^ _mix(position + SECOND))
    bits = (_mix(_mix(token + TOKEN) ^ first, second) for token in tokens)
    return [-math.log(-math.log((each + 0.5) / 2**32)) for each in bits]


def _mix(x: int, key: int = 0) -> int:
    """`noise._mix` of one number."""
    x &= MASK
    x = ((x ^ (x >> 16)) * MULTIPLIERS[0] & MASK) ^ key
    x = (x ^ (x >> 15)) * MULTIPLIERS[1] & MASK
    return x ^ (x >> 16)
