"""Log-probabilities of tokens under the model's own distribution: the log-softmax of raw logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.workers.core import TokenLogprob

_SLICE = 256  # rows at a time: a [rows, vocab] copy in fp32 of a whole prefill chunk could be gigabytes


class Judged(NamedTuple):
    """How likely some tokens were: logprobs fp32 [R], ranks int64 [R]; and of the likeliest tokens, in order,
    top_tokens int64 [R, N] and top_logprobs fp32 [R, N]."""

    logprobs: Tensor
    ranks: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


def judge(logits: Tensor, rows: Tensor, tokens: Tensor, top: int) -> Judged:
    """On the logits' device.

    Args:
        logits: [*, vocab], any float dtype, as the model gave them.
        rows: [R] int64, which of them judge.
        tokens: [R] int64, the token that is judged by each.
        top: how many of the likeliest tokens are reported, too.
    """
    parts = zip(rows.split(_SLICE), tokens.split(_SLICE), strict=True)
    return Judged(*map(torch.cat, zip(*(_of_slice(logits[some], chosen, top) for some, chosen in parts), strict=True)))


def tell(judged: Judged, top: list[int]) -> list[TokenLogprob]:
    """On the host: one per row, with as many of the likeliest tokens as `top` says."""
    rows = zip(*(tensor.tolist() for tensor in judged), top, strict=True)
    return [TokenLogprob(value, rank, ids[:n], values[:n]) for value, rank, ids, values, n in rows]


def _of_slice(logits: Tensor, tokens: Tensor, top: int) -> Judged:
    everything = logits.float().log_softmax(-1)
    chosen = everything.gather(-1, tokens[:, None])
    best = everything.topk(min(top, logits.shape[-1]), dim=-1)
    return Judged(chosen[:, 0], (everything > chosen).sum(-1) + 1, best.indices, best.values)
