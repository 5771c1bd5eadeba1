"""Drawn tokens follow the softmax; greedy rows are an argmax in any company."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from stepladder.workers import sampler
from stepladder.workers.core import Sample, SamplingParams

DRAWS = 20000


def sample(logits: Tensor, samples: list[Sample]) -> list[int]:
    return sampler.sample(logits, samples).tolist()


def wish(row: int, position: int, seed: int, temperature: float, top_p: float) -> Sample:
    params = SamplingParams(seed=seed, temperature=temperature, top_p=top_p)
    return Sample(row, position, params, [0], 1)


def reference(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities after temperature and nucleus (Holtzman et al. 1904.09751 §3.1), in fp64, token by token."""
    p = (logits.double() / temperature).softmax(-1)
    kept, total = [], 0.0
    for token in sorted(range(len(p)), key=lambda t: -float(p[t])):
        kept.append(token)
        total += float(p[token])
        if total >= top_p:
            break
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.9, 1.0), (1.0, 0.9), (0.8, 0.5), (2.0, 0.99), (1.0, 1e-3)]
)
@pytest.mark.parametrize("keys", ["seeds", "positions", "both"])
def test_tokens_follow_the_softmax(temperature: float, top_p: float, keys: str) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(8)) * 1.5
    wanted = [
        wish(0, 5 if keys == "seeds" else i, 3 if keys == "positions" else 1000 - i, temperature, top_p)
        for i in range(DRAWS)
    ]
    counts = torch.bincount(torch.tensor(sample(logits.expand(DRAWS, -1), wanted)), minlength=24).double()
    p = reference(logits, temperature, top_p)
    assert counts[p == 0].sum() == 0, "a token outside the nucleus was drawn"
    common = p * DRAWS >= 5  # chi-square needs five expected draws; the rest is one class
    seen, expected = counts[common].tolist(), (p[common] * DRAWS).tolist()
    if (rest := float(p[~common].sum()) * DRAWS) > 0:
        seen.append(float(counts[~common].sum()))
        expected.append(rest)
    if len(seen) == 1:
        assert seen == [DRAWS]
    else:
        assert stats.chisquare(seen, expected).pvalue > 1e-4


def test_noise_of_a_seed_does_not_follow_the_tokens_of_the_last_position() -> None:
    """Pairs of neighbouring draws of one request are independent."""
    wanted = [wish(0, position, 11, 1.0, 1.0) for position in range(DRAWS)]
    tokens = torch.tensor(sample(torch.zeros(DRAWS, 6), wanted))
    table = torch.bincount(tokens[:-1] * 6 + tokens[1:], minlength=36).view(6, 6)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(-3, 3), min_size=9, max_size=9),  # many ties
        st.sampled_from((0.0, 0.0, 0.5, 1.0, 2.0)),
        st.sampled_from((1.0, 0.9, 0.4, 1e-60)),
        st.integers(-(2**63), 2**63 - 1),
    ),
    min_size=1,
    max_size=8,
)


@given(ROWS)
def test_a_row_draws_the_same_token_in_every_batch(rows: list[tuple[list[int], float, float, int]]) -> None:
    logits = torch.tensor([r[0] for r in rows], dtype=torch.float32)
    wanted = [wish(i, i + 1, seed, t, p) for i, (_, t, p, seed) in enumerate(rows)]
    batch = sample(logits, wanted)
    for i, (values, temperature, top_p, _) in enumerate(rows):
        assert sample(logits[i : i + 1], wanted[i : i + 1]) == [batch[i]]
        if temperature == 0:
            assert batch[i] == values.index(max(values)), "greedy is the first of the likeliest"
        elif top_p == 1e-60:
            assert values[batch[i]] == max(values), "a tiny nucleus keeps only the likeliest"


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True), st.floats(0.01, 0.99), st.data())
def test_top_p_keeps_the_smallest_set(values: list[float], top_p: float, data: st.DataObject) -> None:
    logits = torch.tensor(values)
    kept = reference(logits, 1.0, top_p) > 0
    if abs(float(logits.double().softmax(-1)[kept].sum()) - top_p) < 1e-5:
        return  # the last token is in or out by rounding
    smaller = float(logits.double().softmax(-1)[kept].sum() - logits.double().softmax(-1)[kept].min())
    if abs(smaller - top_p) < 1e-5:
        return
    position = data.draw(st.integers(0, 10**6))
    wanted = [wish(0, position + i, 4, 1.0, top_p) for i in range(64)]
    assert all(kept[token] for token in sample(logits.expand(64, -1), wanted))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-42, 1e-300])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_tiny_temperatures_are_greedy(temperature: float, shift: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -4.0]]) + shift
    assert sample(logits, [wish(0, 1, 0, temperature, 0.9)]) == [1]
    assert sample(logits, [wish(0, 1, 0, temperature, 1.0)]) == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]], dtype=dtype)
    assert sample(logits, [wish(0, 1, 0, 0.0, 1.0), wish(1, 1, 0, 0.1, 0.9)]) == [1, 0]
