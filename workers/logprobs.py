"""Log-probabilities of tokens under the model's own distribution: the log-softmax of raw logits."""

import torch
from torch import Tensor

from workers.core import TokenLogprob

_SLICE = 256  # rows at a time: a [rows, vocab] copy in fp32 of a whole prefill chunk could be gigabytes


def token_logprobs(logits: Tensor, tokens: list[int], top: list[int]) -> list[TokenLogprob]:
    """One per row.

    Args:
        logits: [R, vocab], any float dtype, as the model gave them.
        tokens: [R] the token that is judged by each row.
        top: [R] how many of the likeliest tokens each row reports, too.
    """
    found: list[TokenLogprob] = []
    for first in range(0, len(tokens), _SLICE):
        part = slice(first, first + _SLICE)
        found.extend(_of_slice(logits[part], tokens[part], top[part]))
    return found


def _of_slice(logits: Tensor, tokens: list[int], top: list[int]) -> list[TokenLogprob]:
    everything = logits.float().log_softmax(-1)
    chosen = everything.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (everything > chosen).sum(-1) + 1
    best = everything.topk(min(max(top), logits.shape[-1]), dim=-1)
    rows = zip(chosen[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist(), top, strict=True)
    return [TokenLogprob(value, rank, ids[:n], values[:n]) for value, rank, ids, values, n in rows]
