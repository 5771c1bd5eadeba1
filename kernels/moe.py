"""Mixture of experts, defined: who computes a token, and what comes of it. Other forms must equal this one.

Letters: T tokens, E experts, k of these per token, h hidden, P = T k pairs of a token and one of its experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


def route(logits: Tensor, per_token: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token, the likeliest first; of equals the lowest wins.

    Args:
        logits: [T, E]. The softmax is in fp32, or in fp64 if they are.
        renormalise: whether the weights of a token sum to 1.

    Returns:
        Weights [T, k] in the dtype of the softmax; experts [T, k], int64.
    """
    shares = logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    ordered, experts = shares.sort(stable=True, dim=-1, descending=True)
    weights = ordered[:, :per_token]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts[:, :per_token]


def mix(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert], first: int = 0) -> Tensor:
    """What the experts held here add to each token: [T, h] in the dtype of `weights`. The terms of a token are added in
    the order of `chosen`; experts elsewhere contribute nothing.

    Args:
        x: [T, h]. weights, chosen: as `route` gives them.
        experts: the experts `first`, `first + 1`, ... Each maps [rows, h] to [rows, h], and gets all its rows at once,
            in the order of the tokens; one without rows is not called.
    """
    tokens, per_token = chosen.shape
    local = chosen.flatten() - first
    pairs = local.argsort(stable=True)
    counts = torch.bincount(local.clamp(-1, len(experts)) + 1, minlength=len(experts) + 2).tolist()
    mine = pairs.split(counts)[1 : 1 + len(experts)]
    results = [expert(x[rows // per_token]) for expert, rows in zip(experts, mine, strict=True) if len(rows)]
    each = torch.zeros(len(local), x.shape[-1], dtype=weights.dtype, device=x.device)
    if results:
        each = each.index_copy(0, pairs[counts[0] : counts[0] + sum(map(len, mine))], torch.cat(results).to(each.dtype))
    terms = each.view(tokens, per_token, x.shape[-1]) * weights[..., None]
    total = terms[:, 0]
    for nth in range(1, per_token):
        total = total + terms[:, nth]
    return total
