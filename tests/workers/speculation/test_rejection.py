"""The rule of rejection keeps the law of the text: joint law of T tokens on tabular models, by a chi-squared test.

60,000 samples and p < 1e-6: with fewer, a drafter that draws at another temperature than it says is found half the
time; with a milder bound some of many tests would fail by chance. Seeds are fixed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from stepladder.kernels.noise import gumbel, uniform
from stepladder.workers.core import Sample, SamplingParams, StepPlan
from stepladder.workers.sampler import draw
from stepladder.workers.speculation import verifier

VOCAB, K, T, COUNT, RARE = 6, 3, 5, 60_000, 1e-6

Accepted = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Residual = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def table(seed: int, sharp: float = 1.0) -> Tensor:
    """log p of the next token behind the last two: fp32 [VOCAB, VOCAB, VOCAB]."""
    return (sharp * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def exact(p: Tensor) -> Tensor:
    """Probabilities of all texts of T tokens behind (0, 0): [VOCAB ** T]."""
    found: dict[tuple[int, ...], float] = {(0, 0): 1.0}
    for _ in range(T):
        found = {
            (*text, token): weight * float(p[text[-2], text[-1], token].exp())
            for text, weight in found.items()
            for token in range(VOCAB)
        }
    return torch.tensor(list(found.values()), dtype=torch.float64)


def speculate(
    p: Tensor, q: Tensor, accepted: Accepted, residual: Residual, drawn_from: Tensor | None = None,
    bonus: Tensor | None = None, draws: bool = True,
) -> Tensor:  # fmt: skip
    """COUNT texts of T tokens in rounds of K drafted tokens, all texts at once: [COUNT, T].

    Args:
        q: what the drafter says that it draws from. drawn_from: what it really draws from.
        bonus: what the token behind a draft that is accepted whole is drawn from; p, if it is right.
        draws: else it proposes its likeliest token.
    """
    seeds, text = torch.arange(COUNT), torch.zeros(COUNT, 2 + T + 2 * K + 2, dtype=torch.int64)
    done = torch.full((COUNT,), 2)
    every = torch.arange(COUNT)
    while (done < 2 + T).any():
        work = text.clone()
        for i in range(K):  # the draft, at positions done + i
            at = done + i
            law = (q if drawn_from is None else drawn_from)[work[every, at - 2], work[every, at - 1]]
            noise = gumbel(seeds + COUNT, at, VOCAB) if draws else 0.0
            work[every, at] = (law + noise).argmax(-1)
        going, used = torch.ones(COUNT, dtype=torch.bool), torch.zeros(COUNT, dtype=torch.int64)
        result = text.clone()
        for i in range(K + 1):
            at = done + i
            before = work[every, at - 2], work[every, at - 1]
            scores, law = p[before], q[before].exp() if draws else None
            noise = gumbel(seeds, at, VOCAB)
            if i == K:
                last = (p if bonus is None else bonus)[before]
                result[every, at] = torch.where(going, (last + noise).argmax(-1), result[every, at])
                used += going
                break
            token = work[every, at]
            right = accepted(scores, token, uniform(seeds, at), law)
            instead = (residual(scores, token, law) + noise).argmax(-1)
            result[every, at] = torch.where(going, torch.where(right, token, instead), result[every, at])
            used += going
            going = going & right
        alive = done < 2 + T
        text = torch.where(alive[:, None], result, text)
        done = torch.where(alive, done + used, done)
    return text[:, 2 : 2 + T]


def p_value(texts: Tensor, want: Tensor) -> float:
    """Of Pearson's chi-squared; texts that are rarer than five in all are one class."""
    place = VOCAB ** torch.arange(T - 1, -1, -1)
    seen = torch.bincount((texts * place).sum(-1), minlength=VOCAB**T).double()
    expected = want * len(texts)
    rare = expected < 5
    seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), len(seen) - 1))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("draws", [True, False])
def test_the_law_of_the_text_is_the_targets(seed: int, draws: bool) -> None:
    p, q = table(seed), table(seed + 10, 1.5)
    texts = speculate(p, q, verifier.accepted, verifier.residual, draws=draws)
    assert p_value(texts, exact(p)) > RARE


def without_floor(scores: Tensor, drafted: Tensor, u: Tensor, q: Tensor | None) -> Tensor:
    """Always accepts what is a little likely."""
    p = scores.softmax(-1).gather(-1, drafted[:, None])[:, 0]
    return verifier.accepted(scores, drafted, u, q) | (p > 0.15)


PLANTED = {
    "bonus from the draft": {"bonus": table(11, 1.5)},
    "residual is p": {"residual": lambda scores, drafted, q: scores},
    "drafted at another temperature than is said": {"drawn_from": (table(11, 1.5) / 0.8).log_softmax(-1)},
    "q recomputed from another version": {"drawn_from": table(12, 1.5)},
    "accepts from some probability on": {"accepted": without_floor},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    p, q = table(1), table(11, 1.5)
    rules = {"accepted": verifier.accepted, "residual": verifier.residual, **PLANTED[fault]}
    assert p_value(speculate(p, q, **rules), exact(p)) < RARE  # type: ignore[arg-type]


def same_law(one: Tensor, other: Tensor) -> None:
    """Two samples' counts; where only one class is left, both must have it."""
    total, n, m = one + other, one.sum(), other.sum()
    there = total > 0
    statistic = ((one * (m / n) ** 0.5 - other * (n / m) ** 0.5) ** 2 / total.clamp_min(1))[there].sum()
    classes = int(there.sum())
    assert classes == 1 or float(chi2.sf(statistic, classes - 1)) > RARE


def counts(tokens: list[int]) -> Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_the_samplers_rows_have_the_law_of_plain_sampling(truncation: dict[str, Any]) -> None:
    """Two tokens: the draft's place and the one behind it, at a temperature and truncated, through `draw` itself."""
    count = 20_000
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
    likeliest = int(logits[0].argmax())

    def drawn(draft: tuple[int, ...], first: int) -> list[list[int]]:
        params = [SamplingParams(temperature=0.7, seed=first + i, **truncation) for i in range(count)]
        width = 1 + len(draft)
        samples = [Sample(width * i, 5, p, [1] * 5, 3, draft=draft, coupled=False) for i, p in enumerate(params)]
        rows = logits[:width] if draft else logits[:1]
        plan = StepPlan(rows=[*range(width * count)], samples=samples)
        return draw(rows.repeat(count, 1), plan).result().tokens

    texts, plain = drawn((likeliest,), 0), drawn((), count)
    same_law(counts([tokens[0] for tokens in texts]), counts([tokens[0] for tokens in plain]))
    behind = counts([tokens[1] for tokens in texts if len(tokens) > 1])
    logits = logits[1:]
    same_law(behind, counts([tokens[0] for tokens in drawn((), 2 * count)]))


def test_log_probabilities_are_of_the_tokens_that_stand_there() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, 0.0, 1.0]])
    for seed in range(20):
        one = Sample(0, 4, SamplingParams(seed=seed, logprobs=0), [1] * 4, 2, draft=(2,), coupled=False)
        result = draw(logits, StepPlan(rows=[0, 1], samples=[one])).result()
        want = [float(row.log_softmax(-1)[token]) for row, token in zip(logits, result.tokens[0], strict=False)]
        assert [one.logprob for one in result.logprobs[0]] == pytest.approx(want)
