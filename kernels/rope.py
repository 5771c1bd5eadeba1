"""Rotary position embedding (Su et al. 2104.09864).

Which two dimensions turn together: i and i + head_dim/2 (half-split, Llama in the Hugging Face layout), or 2i and
2i + 1 (interleaved, the paper's own and Cohere's).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of a model were stretched for longer contexts.

    Attributes:
        kind: `linear` divides every frequency by `factor` (Chen et al. 2306.15595); `llama3` divides only the slow ones
            and leaves the fast ones, with a ramp between (Llama 3.1, arXiv 2407.21783 §3.4.2 and its reference code).
        low, high: for llama3, a slow frequency makes at most `low` turns in `original_positions`, a fast one at least
            `high`.
        original_positions: for llama3, the context before stretching.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not supported; it must be 'linear' or 'llama3'")
        if not self.factor > 0 or not self.original_positions > 0 or not self.high > self.low > 0:
            raise ValueError("rope scaling needs a positive factor and 0 < low_freq_factor < high_freq_factor")


def rope_frequencies(head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None) -> Tensor:
    """theta^(-2i/head_dim) for i in [0, head_dim/2), stretched by `scaling`: fp32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (theta**exponent)
    if scaling is None:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    ramp = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return (1 - ramp) * slow + ramp * frequencies


def rope_table(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency: two [tokens, 1, head_dim] tensors, shared by every layer of a step."""
    angle = positions.to(frequencies.dtype)[:, None] * frequencies
    angle = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype)[:, None, :], angle.sin().to(dtype)[:, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate [tokens, heads, head_dim] by the angles of a table with the same layout."""
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = x.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
    return x * cos + turned * sin
