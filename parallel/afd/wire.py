"""How rows travel between the pools: as they are, or as FP8 with a scale per 128 columns.

As in Step-3 (2507.19427), only A -> F may be FP8; what F adds to the stream travels in the model's dtype. A -> F
carries contributions to a stream of which F holds a copy. What a message loses stays lost in F's copy until the step
ends; A's own stream is exact, but for what F computes from its copy.
"""

import torch
from torch import Tensor

from stepladder.kernels.fp8 import dequantise, num_scales, quantise
from stepladder.parallel.spec import ModelSpec

SCALE_BYTES = torch.float32.itemsize


class Wire:
    """What the body of a message is: the rows in their own dtype. Both ends of an edge must mean the same wire."""

    name = "plain"

    def size(self, tokens: int, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of a body with rows [tokens, hidden] of `dtype`."""
        return tokens * hidden * dtype.itemsize

    def write(self, rows: Tensor, body: Tensor) -> None:
        """Fill `body` [size] uint8 with `rows` [tokens, hidden]."""
        body.view(rows.dtype).view(rows.shape).copy_(rows)

    def read(self, body: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        """The rows [tokens, hidden] of `dtype`; they may share the body's memory."""
        return body.view(dtype).view(-1, hidden)


class Fp8(Wire):
    """All scales [tokens, groups] fp32, which must lie aligned, then all codes [tokens, hidden] e4m3."""

    name = "fp8"

    def size(self, tokens: int, hidden: int, dtype: torch.dtype) -> int:
        return tokens * (SCALE_BYTES * num_scales(hidden) + hidden)

    def write(self, rows: Tensor, body: Tensor) -> None:
        codes, scales = quantise(rows)
        split = scales.numel() * SCALE_BYTES
        body[:split].view(torch.float32).view(scales.shape).copy_(scales)
        body[split:].view(torch.float8_e4m3fn).view(codes.shape).copy_(codes)

    def read(self, body: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        tokens, groups = len(body) // self.size(1, hidden, dtype), num_scales(hidden)
        split = tokens * groups * SCALE_BYTES
        scales = body[:split].view(torch.float32).view(tokens, groups)
        return dequantise(body[split:].view(torch.float8_e4m3fn).view(tokens, hidden), scales, dtype)


PLAIN, FP8 = Wire(), Fp8()
WIRES = {wire.name: wire for wire in (PLAIN, FP8)}


def wire_to_ffn(name: str, spec: ModelSpec) -> Wire:
    """What the edges A -> F of this checkpoint carry under the option `name`.

    Raises:
        ValueError: an unknown name, or FP8 for a checkpoint with a block at lag 1.
    """
    if name not in WIRES:
        raise ValueError(f"the wire from attention to FFN is {name!r}; it must be one of {', '.join(WIRES)}")
    if name == FP8.name and any(spec.is_ladder(layer) for layer in range(spec.num_layers)):
        raise ValueError(
            f"the fp8 wire is for checkpoints without ladder layers, and this one's residual is {spec.residual}; "
            "use the plain wire"
        )
    return WIRES[name]
