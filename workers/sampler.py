"""From logits to tokens: temperature, top-p, and noise that depends only on the request's seed and the position."""

import torch
from torch import Tensor

from kernels.noise import gumbel
from workers.core import Sample


def sample(logits: Tensor, wanted: list[Sample]) -> list[int]:
    """Draw one token per row.

    Args:
        logits: [R, vocab], any float dtype.
        wanted: R samples.
    """
    if all(s.temperature == 0 for s in wanted):
        return logits.argmax(-1).tolist()
    temperature = torch.tensor([s.temperature for s in wanted], device=logits.device)[:, None]
    logits = logits.float()
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature.where(
        temperature > 0, 1.0
    )  # at most 0: no overflow
    if any(s.top_p < 1 and s.temperature > 0 for s in wanted):
        scores = _keep_top_p(scores, torch.tensor([s.top_p for s in wanted], device=logits.device)[:, None])
    seeds = torch.tensor([s.seed for s in wanted], device=logits.device)
    positions = torch.tensor([s.position for s in wanted], device=logits.device)
    noise = gumbel(seeds, positions, logits.shape[-1])
    return (scores + noise.where(temperature > 0, 0.0)).argmax(-1).tolist()


def _keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Drop every token outside the smallest set whose probability reaches top_p; the likeliest always stays."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    drop = probability.cumsum(-1) - probability >= top_p
    drop[:, 0] = False  # a tiny top_p is 0 in fp32
    return scores.masked_fill(drop.scatter(-1, order, drop) & (top_p < 1), float("-inf"))
