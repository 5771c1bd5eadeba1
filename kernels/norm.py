"""RMSNorm (Zhang & Sennrich 2019, eq. 4), as Llama uses it: statistics in fp32, result in the input's dtype."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension.

    Args:
        x: [..., hidden], any float dtype.
        weight: [hidden].
        eps: added to the mean square.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
