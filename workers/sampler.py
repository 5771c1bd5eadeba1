"""From logits to tokens, on rank 0. Each feature touches only the rows that ask for it, all of them at once.

Everything is a function of the sequence's own tokens, parameters and position, so that a replay draws the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.noise import gumbel
from workers.core import Sample, StepPlan, StepResult
from workers.logprobs import token_logprobs

_TINY = torch.finfo(torch.float32).tiny


@torch.inference_mode()
def resolve(logits: Tensor, plan: StepPlan) -> StepResult:
    """What a plan asks of its logits [rows, vocab]: tokens drawn, and log-probabilities where they are wanted."""
    sampled = logits[[s.row for s in plan.samples]] if plan.scores else logits  # without scores, row i is sample i's
    tokens = sample(sampled, plan.samples)
    asked = {i: s.params.logprobs for i, s in enumerate(plan.samples) if s.params.logprobs is not None}
    found = token_logprobs(sampled[list(asked)], [tokens[i] for i in asked], list(asked.values())) if asked else []
    scores = [
        token_logprobs(logits[s.row : s.row + len(s.targets)], s.targets, [s.top] * len(s.targets)) for s in plan.scores
    ]
    return StepResult(tokens, dict(zip(asked, found, strict=True)), scores)


@torch.inference_mode()
def sample(logits: Tensor, samples: list[Sample]) -> list[int]:
    """Draw one token per row.

    Args:
        logits: [R, vocab], any float dtype; not changed.
        samples: R samples.
    """
    if not samples:
        return []
    logits = _adjusted(logits, samples)
    drawn = [i for i, s in enumerate(samples) if s.params.temperature > 0]
    if len(drawn) == len(samples):
        return _draw(logits, samples).tolist()
    tokens = logits.argmax(-1)
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [samples[i] for i in drawn])
    return tokens.tolist()


def _adjusted(logits: Tensor, samples: list[Sample]) -> Tensor:
    """With logit_bias, the barred tokens of min_tokens, and penalties."""
    rows = [i for i, s in enumerate(samples) if s.barred or s.params.adjusts_logits]
    if not rows:
        return logits
    logits, wanted = logits.float().clone(), [samples[i] for i in rows]
    part = logits[rows]
    _add_bias(part, wanted)
    at, tokens = _pairs([s.barred for s in wanted], logits)
    part[at, tokens] = float("-inf")
    if any(s.params.repetition_penalty != 1 for s in wanted):
        part = _with_repetition_penalty(part, wanted)
    if any(s.params.presence_penalty or s.params.frequency_penalty for s in wanted):
        part = _with_count_penalties(part, wanted)
    logits[rows] = part
    return logits


def _add_bias(logits: Tensor, samples: list[Sample]) -> None:
    at, tokens = _pairs([list(s.params.logit_bias) for s in samples], logits)
    values = [value for s in samples for value in s.params.logit_bias.values()]
    logits[at, tokens] += torch.tensor(values, device=logits.device)


def _with_repetition_penalty(logits: Tensor, samples: list[Sample]) -> Tensor:
    """Over prompt and output."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[_pairs([_history(s, 0, s.params.repetition_penalty != 1) for s in samples], logits)] = True
    penalty = _column([s.params.repetition_penalty for s in samples], logits)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _with_count_penalties(logits: Tensor, samples: list[Sample]) -> Tensor:
    """Presence and frequency, over the output."""
    wanted = [bool(s.params.presence_penalty or s.params.frequency_penalty) for s in samples]
    pairs = _pairs([_history(s, s.num_prompt, asks) for s, asks in zip(samples, wanted, strict=True)], logits)
    counts = torch.zeros_like(logits).index_put_(pairs, torch.ones((), device=logits.device), accumulate=True)
    frequency = _column([s.params.frequency_penalty for s in samples], logits)
    presence = _column([s.params.presence_penalty for s in samples], logits)
    return logits - frequency * counts - presence * (counts > 0)


def _history(sample: Sample, start: int, asked: bool) -> list[int]:
    return sample.tokens[start : sample.position] if asked else []


def _pairs(tokens: Sequence[Sequence[int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, tokens): indices of every token listed for each row."""
    rows = [row for row, listed in enumerate(tokens) for _ in listed]
    flat = [token for listed in tokens for token in listed]
    both = torch.tensor([rows, flat], dtype=torch.int64, device=like.device)
    return both[0], both[1]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]


def _draw(logits: Tensor, samples: list[Sample]) -> Tensor:
    """argmax(log p + Gumbel noise) after temperature and truncation; all temperatures are above 0."""
    params, logits = [s.params for s in samples], logits.float()
    temperature = _column([p.temperature for p in params], logits).clamp_min(_TINY)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no overflow
    vocab_size = logits.shape[-1]
    scores = _truncate(scores, [p.min_p if p.min_p > 0 else None for p in params], _below_min_p)
    scores = _truncate(scores, [p.top_k if 0 < p.top_k < vocab_size else None for p in params], _below_top_k)
    scores = _truncate(scores, [p.top_p if p.top_p < 1 else None for p in params], _outside_top_p)
    seeds = torch.tensor([p.seed for p in params], device=logits.device)
    positions = torch.tensor([s.position for s in samples], device=logits.device)
    return (scores + gumbel(seeds, positions, vocab_size)).argmax(-1)


def _truncate(scores: Tensor, values: Sequence[float | None], outside: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Set the scores that `outside` (scores, values [R, 1]) marks to -inf, in the rows that have a value."""
    rows = [row for row, value in enumerate(values) if value is not None]
    if not rows:
        return scores
    part = scores if len(rows) == len(values) else scores[rows]
    part = part.masked_fill(outside(part, _column([v for v in values if v is not None], scores)), float("-inf"))
    if len(rows) == len(values):
        return part
    scores[rows] = part
    return scores


def _below_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Tokens less likely than min_p times the likeliest, whose score is 0."""
    return scores < min_p.log()


def _below_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Tokens behind the top_k-th; those as likely as it stay."""
    best = scores.topk(int(top_k.max()), dim=-1).values
    return scores < best.gather(-1, top_k - 1)


def _outside_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Tokens outside the smallest set whose probability reaches top_p; the likeliest always stays."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    outside = probability.cumsum(-1) - probability >= top_p
    outside[:, 0] = False  # a tiny top_p is 0 in fp32
    return torch.zeros_like(outside).scatter(-1, order, outside)
