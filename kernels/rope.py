"""Rotary position embedding (Su et al. 2104.09864), in the half-split layout of Hugging Face Llama."""

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/head_dim) for i in [0, head_dim/2): fp32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / (theta**exponent)


def rope_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency: two [tokens, 1, head_dim] tensors, shared by every layer of a step."""
    angle = positions.to(frequencies.dtype)[:, None] * frequencies
    angle = torch.cat((angle, angle), dim=-1)[:, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [tokens, heads, head_dim] by the table's angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
