"""The norms of a transformer: statistics in fp32 (or wider), result in the input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4).

    It is rounded to the input's dtype before the weight is applied, as in Llama.

    Args:
        x: [..., D], any float dtype.
        weight: [D] or anything that broadcasts over x.
        eps: added to the mean square.
    """
    wide = x.float() if x.dtype in HALF else x
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(x - mean) / std * weight over the last dimension (Ba et al. 1607.06450), without a bias.

    It is rounded to the input's dtype after the weight is applied, as in Cohere.

    Args:
        x: [..., D], any float dtype.
        weight: [D] or anything that broadcasts over x.
        eps: added to the variance.
    """
    wide = x.float() if x.dtype in HALF else x
    return (weight * F.layer_norm(wide, wide.shape[-1:], eps=eps)).to(x.dtype)
