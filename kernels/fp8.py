"""Rows as FP8 e4m3, with one fp32 scale for every 128 columns: 33 bytes for 128 of fp32 or 64 of bf16."""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128  # columns that share a scale; the last group of a row may be shorter
LARGEST = 448.0  # of e4m3 without infinities (Micikevicius et al. 2209.05433, table 1)
FP32 = torch.finfo(torch.float32)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each group becomes 448, everything else is rounded to nearest, ties to even.

    Args:
        x: [T, h], any float dtype. Of finite values none becomes a NaN or an infinity: a group below 448 times fp32's
            smallest normal number is rounded to steps of its own 2^-9, one above 448 times the largest saturates. A NaN
            makes its whole group NaN, so that it stays visible.

    Returns:
        codes [T, h] float8_e4m3fn and scales [T, ceil(h / 128)] fp32, on x's device; x is about codes * scales.
    """
    groups = _grouped(x.to(_wide(x.dtype)))
    scales = (groups.abs().amax(-1) / LARGEST).clamp(FP32.tiny, FP32.max).to(torch.float32)
    codes = groups / scales[..., None].to(groups.dtype)
    codes = codes.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)  # torch's cast itself does not saturate
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scales, multiplied in fp32 (fp64 for fp64) and rounded once to `dtype`: [T, h]."""
    groups = _grouped(codes.to(_wide(dtype)))
    return (groups * scales[..., None].to(groups.dtype)).flatten(1)[:, : codes.shape[1]].to(dtype)


def num_scales(columns: int) -> int:
    """Of a row with so many columns."""
    return -(-columns // GROUP)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _grouped(x: Tensor) -> Tensor:
    """[T, h] -> [T, groups, 128], the last group filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (num_scales(x.shape[1]), GROUP))
