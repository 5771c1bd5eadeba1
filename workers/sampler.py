"""From logits to tokens, on rank 0. Each feature touches only the rows that ask for it, all of them at once.

A draft is verified by drawing at each of its rows what plain decoding would draw there, with the same noise, and by
going on with these as far as the draft agrees ("coupled", Daliri et al. 2408.07978): the text is plain decoding's at
any temperature, whoever drafted. Samples that need not be are verified by the rule in speculation/verifier.py.

Everything is a function of the sequence's own tokens, parameters and position, so that a replay draws the same. All of
it is queued on the device; only `Drawn.result` waits for it.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepladder.kernels import noise
from stepladder.kernels.cpu import sampling as cpu
from stepladder.kernels.noise import uniform
from stepladder.kernels.transfer import Download, upload
from stepladder.workers.core import Sample, StepPlan, StepResult
from stepladder.workers.grammar.mask import masked
from stepladder.workers.logprobs import Judged, judge, tell
from stepladder.workers.speculation import verifier
from stepladder.workers.speculation.drafter import agreeing

_TINY = torch.finfo(torch.float32).tiny


class Rows(NamedTuple):
    """What was drawn at the rows of all samples, on the device.

    tokens: int64 [R], what the sequence goes on with if it goes on here. accepted: bool [R], whether the drafted token
    of the row is; None where that is to be seen from the tokens. likely: int64 [R, n], and hidden: [R, hidden], if
    asked for; the latter stays on the device.
    """

    tokens: Tensor
    accepted: Tensor | None = None
    likely: Tensor | None = None
    hidden: Tensor | None = None


class Drawn:
    """What a step drew and scored, on its way to the host.

    Args:
        plan: what was asked for.
        asked: the samples whose log-probabilities are wanted.
        judged: log-probabilities of their rows, then of all scores' targets; None if none are wanted.

    Attributes:
        tokens: int64, those drawn, for every row of every sample, on the device.
    """

    def __init__(self, plan: StepPlan, rows: Rows, asked: list[int], judged: Judged | None) -> None:
        self.tokens, self._asked, self._samples, self._hidden = rows.tokens, asked, plan.samples, rows.hidden
        self._tops = [[plan.samples[i].params.logprobs or 0] * (1 + len(plan.samples[i].draft)) for i in asked]
        self._tops += [[score.top] * len(score.targets) for score in plan.scores]
        self._extra = [rows.accepted is not None, rows.likely is not None]
        extra = [tensor for tensor in (rows.accepted, rows.likely) if tensor is not None]
        self._landing = Download((rows.tokens, *extra, *(judged or ())), rows.tokens.device)

    def result(self) -> StepResult:
        """Wait for it."""
        tokens, *rest = self._landing.wait()
        accepted, likely = (rest.pop(0).tolist() if there else None for there in self._extra)
        kept, first = [], [0, *accumulate(1 + len(sample.draft) for sample in self._samples)]
        for sample, some in zip(self._samples, starmap(slice, pairwise(first)), strict=True):
            flags = accepted[some] if accepted and not sample.coupled else None
            kept.append(_kept(sample.draft, tokens[some].tolist(), flags))
        found = iter(tell(Judged(*rest), list(chain(*self._tops))) if rest else ())
        parts = [[next(found) for _ in top] for top in self._tops]
        logprobs = {i: part[: len(kept[i])] for i, part in zip(self._asked, parts, strict=False)}
        listed = [likely[some] for some in starmap(slice, pairwise(first))] if likely else []
        states = [self._hidden[some] for some in starmap(slice, pairwise(first))] if self._hidden is not None else []
        return StepResult(kept, logprobs, parts[len(self._asked) :], listed, states)


def _kept(draft: Sequence[int], drawn: list[int], flags: list[bool] | None = None) -> list[int]:
    """Of what was drawn behind 0, 1, ... drafted tokens, what the sequence goes on with.

    Args:
        flags: which drafted tokens are accepted; None if those that were drawn in their places.
    """
    count = agreeing(draft, drawn) if flags is None else agreeing([True] * len(draft), flags)
    return [*draft[:count], drawn[count]]


@torch.inference_mode()
def draw(logits: Tensor, plan: StepPlan, likely: int = 0, hidden: Tensor | None = None, native: bool = False) -> Drawn:
    """What a plan asks of its logits [rows, vocab]: tokens drawn, and log-probabilities where they are wanted.

    Args:
        likely: how many of the likeliest tokens a drafter wants to know for every row of a sample.
        hidden: what the logits were computed from [rows, hidden], if a drafter wants to know that.
        native: draw with the kernels of CPU ranks; what is drawn is the same.
    """
    each = [one for sample in plan.samples for one in sample.each]
    own = _rows(logits, [one.row for one in each])
    rows = _verify(own, each, plan.samples, native)
    if likely:
        rows = rows._replace(likely=own.topk(likely, dim=-1).indices)
    if hidden is not None:
        rows = rows._replace(
            hidden=hidden[upload([one.row for one in each], hidden.device)]
        )  # a copy: graphs reuse theirs
    asked = [i for i, s in enumerate(plan.samples) if s.params.logprobs is not None]
    if not asked and not plan.scores:
        return Drawn(plan, rows, [], None)
    at = [i for i, one in enumerate(each) if one.params.logprobs is not None]
    which = [each[i].row for i in at] + [score.row + i for score in plan.scores for i in range(len(score.targets))]
    targets = upload([target for score in plan.scores for target in score.targets], logits.device)
    top = max([each[i].params.logprobs or 0 for i in at] + [score.top for score in plan.scores])
    told = torch.cat((_rows(_told(rows, plan.samples), at), targets))
    return Drawn(plan, rows, asked, judge(logits, upload(which, logits.device), told, top))


def sample(logits: Tensor, samples: list[Sample]) -> Tensor:
    """Draw one token per row: int64 [R], on the device.

    Args:
        logits: [R, vocab], any float dtype; not changed.
        samples: R samples without drafts.
    """
    return _sample(masked(_adjusted(logits, samples), samples), samples)


def sample_among(logits: Tensor, samples: list[Sample], tokens: Tensor, native: bool = False) -> tuple[Tensor, Tensor]:
    """Draw one of `tokens` [N] per row of their logits [R, N], with the noise that these tokens have in the whole
    vocabulary; without penalties and biases.

    Returns:
        int64 [R], and fp32 [R], how likely the likeliest of them is at temperature 1; on the device.
    """
    if native and (found := _sample_natively(logits, samples, tokens, shares=True)):
        return tokens[found.columns], found.shares
    return tokens[_sample(logits, samples, tokens)], logits.softmax(-1).amax(-1).nan_to_num()


def _sample(logits: Tensor, samples: list[Sample], ids: Tensor | None = None, native: bool = False) -> Tensor:
    """Columns, from logits that have been adjusted and masked. ids: tokens of the columns, if those are not all."""
    if native and (found := _sample_natively(logits, samples, ids)):
        return found.columns
    drawn = [i for i, s in enumerate(samples) if s.params.temperature > 0]
    if drawn and len(drawn) == len(samples):
        return _draw(_scores(logits, samples), samples, ids, native)
    tokens = logits.argmax(-1)
    if drawn:
        at, those = upload(drawn, logits.device), [samples[i] for i in drawn]
        tokens[at] = _draw(_scores(logits[at], those), those, ids, native)
    return tokens


def _sample_natively(
    logits: Tensor, samples: list[Sample], ids: Tensor | None, shares: bool = False
) -> cpu.Sampled | None:
    """The same in one pass over the logits; None where a row is truncated, or where it is not clear what it draws."""
    params = [s.params for s in samples]
    if any(p.truncates for p in params):
        return None
    temperatures, seeds = [p.temperature for p in params], [p.seed for p in params]
    found = cpu.sample(logits.float(), ids, temperatures, seeds, [s.position for s in samples], shares)
    return found if found.clear else None


def _verify(logits: Tensor, each: list[Sample], drafted: list[Sample], native: bool) -> Rows:
    """The rows of all samples; where one is not coupled, a row draws what is to follow if its own draft is rejected."""
    logits = masked(_adjusted(logits, each), drafted)
    tokens, loose = _sample(logits, each, native=native), _loose(drafted)
    if not loose:
        return Rows(tokens)
    at, those = upload([row for row, _ in loose], logits.device), [each[row] for row, _ in loose]
    scores, draft = _scores(logits[at], those), upload([token for _, token in loose], logits.device)
    accepted = torch.zeros_like(tokens, dtype=torch.bool)
    seeds, positions = _keys(those, logits)
    accepted[at] = verifier.accepted(scores, draft, uniform(seeds, positions))
    tokens[at] = _draw(verifier.residual(scores, draft), those, native=native)
    return Rows(tokens, accepted)


def _loose(drafted: list[Sample]) -> list[tuple[int, int]]:
    """(row, drafted token) of all rows that are verified by the rule of rejection."""
    found, first = [], 0
    for sample in drafted:
        if not sample.coupled:
            found += [(first + i, token) for i, token in enumerate(sample.draft)]
        first += 1 + len(sample.draft)
    return found


def _told(rows: Rows, drafted: list[Sample]) -> Tensor:
    """The token that each row stands for: an accepted draft, or what was drawn."""
    if rows.accepted is None:
        return rows.tokens
    draft = upload([token for sample in drafted for token in (*sample.draft, 0)], rows.tokens.device)
    return torch.where(rows.accepted, draft, rows.tokens)


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, in ascending order."""
    return tensor if len(rows) == len(tensor) else tensor[upload(rows, tensor.device)]


def _adjusted(logits: Tensor, samples: list[Sample]) -> Tensor:
    """With logit_bias, the barred tokens of min_tokens, and penalties."""
    rows = [i for i, s in enumerate(samples) if s.barred or s.params.adjusts_logits]
    if not rows:
        return logits
    logits, wanted = logits.float().clone(), [samples[i] for i in rows]
    which = upload(rows, logits.device)
    part = logits[which]
    _add_bias(part, wanted)
    at, tokens = _pairs([s.barred for s in wanted], logits)
    part[at, tokens] = float("-inf")
    if any(s.params.repetition_penalty != 1 for s in wanted):
        part = _with_repetition_penalty(part, wanted)
    if any(s.params.presence_penalty or s.params.frequency_penalty for s in wanted):
        part = _with_count_penalties(part, wanted)
    logits[which] = part
    return logits


def _add_bias(logits: Tensor, samples: list[Sample]) -> None:
    at, tokens = _pairs([list(s.params.logit_bias) for s in samples], logits)
    values = [value for s in samples for value in s.params.logit_bias.values()]
    logits[at, tokens] += upload(values, logits.device, torch.float32)


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
    both = upload([rows, flat], like.device)
    return both[0], both[1]


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return upload(values, like.device, dtype)[:, None]


def _scores(logits: Tensor, samples: list[Sample]) -> Tensor:
    """log p up to a constant, fp32, after temperature and truncation; all temperatures are above 0."""
    params, logits = [s.params for s in samples], logits.float()
    temperature = _column([p.temperature for p in params], logits).clamp_min(_TINY)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no overflow
    vocab_size = logits.shape[-1]
    scores = _truncate(scores, [p.min_p if p.min_p > 0 else None for p in params], _below_min_p)
    scores = _truncate(scores, [p.top_k if 0 < p.top_k < vocab_size else None for p in params], _below_top_k)
    return _truncate(scores, [p.top_p if p.top_p < 1 else None for p in params], _outside_top_p)


def _draw(scores: Tensor, samples: list[Sample], ids: Tensor | None = None, native: bool = False) -> Tensor:
    """argmax(log p + Gumbel noise)."""
    return noise.draw(scores, *_keys(samples, scores), ids, native)


def _keys(samples: list[Sample], like: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds and positions, which all randomness is a function of."""
    return upload([s.params.seed for s in samples], like.device), upload([s.position for s in samples], like.device)


def _truncate(scores: Tensor, values: Sequence[Any], outside: Callable[[Tensor, list[Any]], Tensor]) -> Tensor:
    """Set the scores that `outside` (scores, values) marks to -inf, in the rows whose value is not None."""
    rows = [row for row, value in enumerate(values) if value is not None]
    if not rows:
        return scores
    if len(rows) == len(values):
        return scores.masked_fill(outside(scores, list(values)), float("-inf"))
    which = upload(rows, scores.device)
    part = scores[which]
    scores[which] = part.masked_fill(outside(part, [values[row] for row in rows]), float("-inf"))
    return scores


def _below_min_p(scores: Tensor, min_p: list[float]) -> Tensor:
    """Tokens less likely than min_p times the likeliest, whose score is 0."""
    return scores < _column(min_p, scores).log()


def _below_top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    """Tokens behind the top_k-th; those as likely as it stay."""
    best = scores.topk(max(top_k), dim=-1).values
    return scores < best.gather(-1, _column(top_k, scores, torch.int64) - 1)


def _outside_top_p(scores: Tensor, top_p: list[float]) -> Tensor:
    """Tokens outside the smallest set whose probability reaches top_p; the likeliest always stays."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    outside = probability.cumsum(-1) - probability >= _column(top_p, scores)
    outside[:, 0] = False  # a tiny top_p is 0 in fp32
    return torch.zeros_like(outside).scatter(-1, order, outside)
