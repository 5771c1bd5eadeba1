"""Linear layers for CPU ranks: weights laid out once for oneDNN, which then reads them nearly twice as fast.

A packed product rounds every row alike in any batch of two rows or more; a lone fp32 row goes another way (it splits
the sum). `invariant_linear` therefore never computes a lone row: all that linear layers need for batch invariance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TYPICAL_ROWS = 16  # what the layout is chosen for; it is good for any number


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN lays out this weight [out, in] on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """The weight [out, in] in oneDNN's own layout: an opaque tensor for `linear`, as large as the plain one."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TYPICAL_ROWS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: [T, in] -> [T, out], with a plain or a packed weight."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with a packed weight, each row rounded independently of how many others there are."""
    assert weight.is_mkldnn, "only a packed product is known to be independent of the batch"
    if len(x) == 1:
        return linear(x.expand(2, -1), weight, bias)[:1]
    return linear(x, weight, bias)
