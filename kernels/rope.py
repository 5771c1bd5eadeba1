"""Rotary position embedding (Su et al. 2104.09864).

Which two dimensions turn together: i and i + head_dim/2 (half-split, Llama in the Hugging Face layout), or 2i and
2i + 1 (interleaved, the paper's own and Cohere's).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of a model were stretched for longer contexts.

    Attributes:
        kind: `linear` divides every frequency by `factor` (Chen et al. 2306.15595); `dynamic` changes nothing in
            contexts that the model was made for, and others are not served; `llama3` divides only the slow frequencies
            and leaves the fast ones, with a ramp over turns between (Llama 3.1, arXiv 2407.21783 §3.4.2 and its
            reference code); `yarn` likewise, with a ramp over dimensions (Peng et al. 2309.00071 §3.2); `longrope`
            divides each frequency by a factor of its own (Ding et al. 2402.13753).
        low, high: for llama3 and yarn, a slow frequency makes at most `low` turns in `original_positions`, a fast one
            at least `high`.
        original_positions: the context before stretching.
        attention_factor: cos and sin are multiplied by it.
        truncate: for yarn, the ramp begins and ends at whole dimensions.
        factors, short_factors: for longrope, one per frequency, for long contexts and for those of at most
            `original_positions`.
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()

    def within(self, positions: int) -> "RopeScaling":
        """What holds for an engine whose contexts have at most so many positions; as in vLLM it is the same for all of
        them, so that the keys of one cache agree."""
        is_short = self.kind == "longrope" and positions <= self.original_positions
        return replace(self, factors=self.short_factors) if is_short else self

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope scaling {self.kind!r} is not supported; it must be one of {', '.join(KINDS)}")
        if not self.factor > 0 or not self.original_positions > 0 or not self.high > self.low > 0:
            raise ValueError("rope scaling needs a positive factor and 0 < low_freq_factor < high_freq_factor")
        if not self.attention_factor > 0 or not all(factor > 0 for factor in (*self.factors, *self.short_factors)):
            raise ValueError("rope scaling needs positive factors and a positive attention_factor")


def rope_frequencies(head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None) -> Tensor:
    """theta^(-2i/head_dim) for i in [0, head_dim/2), stretched by `scaling`: fp32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (theta**exponent)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.factors, device=device) * theta**exponent)
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        ramp = 1 - _yarn_ramp(head_dim, theta, scaling).to(device)
    else:
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        ramp = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return (1 - ramp) * slow + ramp * frequencies


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """0 for dimensions that turn fast, 1 for slow ones: fp32 [head_dim / 2]."""

    def dimension(turns: float) -> float:
        """The one that makes so many turns in the original context."""
        return head_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.high), dimension(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def rope_table(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, interleaved: bool = False, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, times `factor`: two [tokens, 1, head_dim] tensors, shared by all layers of a
    step."""
    angle = positions.to(frequencies.dtype)[:, None] * frequencies
    angle = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos(), angle.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype)[:, None, :], sin.to(dtype)[:, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate [tokens, heads, head_dim] by the angles of a table with the same layout."""
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = x.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
    return x * cos + turned * sin
