"""Bias, penalties and truncation against the logits processors of `transformers` and against plain loops.

A row's candidates are compared, not draws: `kept` reads them off by making the noise decide often, or from the argmax.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stepladder.kernels.noise import gumbel
from stepladder.workers import sampler
from stepladder.workers.core import Sample, SamplingParams, StructuredOutputs

VOCAB = 40


def sample(logits: Tensor, samples: list[Sample]) -> list[int]:
    return sampler.sample(logits, samples).tolist()


def logits_of(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def wish(params: SamplingParams, prompt: list[int], output: list[int], barred: tuple[int, ...] = ()) -> Sample:
    tokens = [*prompt, *output]
    return Sample(0, len(tokens), params, tokens, len(prompt), barred)


def drawn_from(scores: Tensor, one: Sample) -> int:
    """The draw that this sample's noise makes from scores [1, vocab] that an oracle has computed."""
    if one.params.temperature == 0:
        return int(scores.argmax())
    noise = gumbel(torch.tensor([one.params.seed]), torch.tensor([one.position]), scores.shape[-1])
    return int((scores + noise).argmax())


def by_transformers(logits: Tensor, one: Sample) -> Tensor:
    """The same processors in the same order, one row."""
    p, ids = one.params, torch.tensor([one.tokens])
    if p.repetition_penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, logits)
    if p.temperature > 0:
        logits = TemperatureLogitsWarper(float(p.temperature))(ids, logits)
    if p.min_p > 0:
        logits = MinPLogitsWarper(p.min_p)(ids, logits)
    if p.top_k > 0:
        logits = TopKLogitsWarper(p.top_k)(ids, logits)
    if p.top_p < 1:
        logits = TopPLogitsWarper(p.top_p)(ids, logits)
    return logits


CASES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_k": -1},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_p": 0.6},
    {"temperature": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.9, "top_k": 3},
    {"temperature": 1.6, "min_p": 0.05, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.5},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_draws_equal_those_from_the_processors_of_transformers(fields: dict[str, float]) -> None:
    rows, logits = 150, logits_of(3, 150)
    wanted = []
    for i in range(rows):
        params = SamplingParams(seed=i, **{"temperature": 1.0, **fields})  # type: ignore[arg-type]
        draw = torch.Generator().manual_seed(i)
        history = torch.randint(VOCAB, (1 + i % 7,), generator=draw).tolist()
        wanted.append(wish(params, history[: 1 + i % 3], history[1 + i % 3 :]))
    got = sample(logits, wanted)
    oracle = [drawn_from(by_transformers(logits[i : i + 1], one), one) for i, one in enumerate(wanted)]
    assert got == oracle
    plain = sample(logits, [one._replace(params=SamplingParams(seed=i)) for i, one in enumerate(wanted)])
    assert got != plain or fields in ({"top_k": 1000}, {"top_k": -1}), "the feature changed nothing"


def by_hand(logits: Tensor, one: Sample) -> Tensor:
    """Bias, barred tokens and penalties, token by token, as OpenAI's and vLLM's documentation define them."""
    p, output = one.params, Counter(one.tokens[one.num_prompt : one.position])
    seen, row = {*one.tokens[: one.position]}, logits[0].tolist()
    for token in range(VOCAB):
        row[token] += p.logit_bias.get(token, 0.0)
        if token in one.barred:
            row[token] = -math.inf
        if token in seen:
            row[token] *= p.repetition_penalty if row[token] < 0 else 1 / p.repetition_penalty
        row[token] -= p.frequency_penalty * output[token] + p.presence_penalty * (token in output)
    return torch.tensor([row])


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=8)
ADJUSTING = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 1.0, 0.5)),
    seed=st.integers(0, 2**40),
    repetition_penalty=st.sampled_from((1.0, 1.0, 1.3, 0.7)),
    presence_penalty=st.sampled_from((0.0, 0.0, 1.5, -2.0)),
    frequency_penalty=st.sampled_from((0.0, 0.0, 0.8, -0.4)),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from((-100.0, -1.0, 2.5, 100.0)), max_size=3),
    top_k=st.sampled_from((0, 4)),
    min_p=st.sampled_from((0.0, 0.1)),
    top_p=st.sampled_from((1.0, 0.7)),
)
WANTED = st.builds(
    lambda params, prompt, output, barred, extra: Sample(
        0, len(prompt) + len(output), params, [*prompt, *output, *extra], len(prompt), tuple(barred)
    ),
    ADJUSTING,
    TOKENS,
    TOKENS,
    st.lists(st.integers(0, VOCAB - 1), max_size=2),
    TOKENS,  # what stands behind the position must not matter
)


@given(st.lists(WANTED, min_size=1, max_size=6), st.integers(0, 99))
def test_any_mixed_batch_equals_one_row_after_the_other(wanted: list[Sample], seed: int) -> None:
    logits = logits_of(seed, len(wanted))
    before = logits.clone()
    got = sample(logits, wanted)
    assert torch.equal(logits, before), "the raw logits are needed for logprobs"
    for i, one in enumerate(wanted):
        assert sample(logits[i : i + 1], [one]) == [got[i]]
        truncating = replace(one.params, repetition_penalty=1.0)
        cut = one._replace(params=truncating, tokens=one.tokens[: one.position])
        assert drawn_from(by_transformers(by_hand(logits[i : i + 1], one), cut), one) == got[i]


def test_penalties_look_at_the_right_part_of_the_history() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 9] = 2.0, 1.9
    for fields, prompt, output, token in (
        ({"presence_penalty": 0.5}, [7], [], 7),
        ({"presence_penalty": 0.5}, [], [7], 9),
        ({"frequency_penalty": 0.06}, [7], [7], 7),
        ({"frequency_penalty": 0.06}, [7], [7, 7], 9),
        ({"repetition_penalty": 1.5}, [7], [], 9),
    ):
        params = SamplingParams(temperature=0.0, **fields)  # type: ignore[arg-type]
        assert sample(logits, [wish(params, [1, *prompt], output)]) == [token]


def test_everything_barred_still_gives_a_token() -> None:
    params = SamplingParams(seed=1)
    for temperature in (0.0, 1.0):
        one = wish(replace(params, temperature=temperature), [1], [], tuple(range(VOCAB)))
        assert 0 <= sample(logits_of(1), [one])[0] < VOCAB


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 1.1}, r"min_p is 1\.1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2\.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {1: 101.0}}, "logit_bias holds a value"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias holds a negative token id"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias holds 1025 tokens"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids holds a negative token id"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be at most max_tokens, which is 16"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"top_k": 2**64}, "top_k is 18446744073709551616; it must be from 1 to 2147483647"),
        ({"top_k": 50.0}, "top_k is 50.0; it must be an integer"),
        ({"max_tokens": True}, "max_tokens is True; it must be an integer"),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648; it must be at least 1 and at most 2147483647"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5; it must be an integer"),
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; it must be between 0.001 and 1000"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf; it must be between"),
        ({"logit_bias": {2**31: 1.0}}, "logit_bias holds a token id above 2147483647"),
        ({"logit_bias": {1: "x"}}, "logit_bias holds a value that is no number"),
        ({"stop_token_ids": (2**64,)}, "stop_token_ids holds a token id above 2147483647"),
        ({"stop_token_ids": (1.0,)}, "stop_token_ids holds a token id that is no integer"),
        ({"logprobs": 1.0}, "logprobs is 1.0; it must be an integer"),
        ({"stop": (1,)}, "stop holds something else than strings"),
        ({"stop": 5}, "stop is 5; it must be a list of strings"),
        ({"stop": True}, "stop is True; it must be a list of strings"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list of token ids"),
        ({"stop_token_ids": "ab"}, "stop_token_ids holds a token id that is no integer"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; it must map token ids to numbers"),
        ({"logit_bias": []}, r"logit_bias is \[\]; it must map token ids to numbers"),
        ({"seed": "1"}, "seed is '1'; it must be an integer"),
        ({"structured_outputs": {"regex": "a"}}, r"structured_outputs is \{.*\}; it must be a StructuredOutputs"),
    ],
)
def test_values_out_of_range_are_a_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"regex": 5}, "regex is 5; it must be a text"),
        ({"grammar": ["a"]}, r"grammar is \['a'\]; it must be a text"),
        ({"choice": "yes"}, "choice is 'yes'; it must be a list of texts"),
        ({"choice": 5}, "choice is 5; it must be a list of texts"),
        ({"choice": ["a", 1]}, r"choice is \['a', 1\]; it must be a list of texts"),
        ({"json_object": 1}, "json_object is 1; it must be true or false"),
        ({"json": 5}, "json must be a schema"),
    ],
)
def test_forms_of_wrong_types_are_a_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StructuredOutputs(**fields)  # type: ignore[arg-type]


def test_none_is_absent_as_in_vllm() -> None:
    nothing: Any = dict.fromkeys(("logit_bias", "stop", "stop_token_ids", "seed", "structured_outputs"))
    assert SamplingParams(**nothing) == SamplingParams() and SamplingParams(**nothing).logit_bias == {}
    none: Any = {"json": None, "json_object": None, "choice": None, "grammar": None}
    assert StructuredOutputs(regex="a", **none) == StructuredOutputs(regex="a")


def test_one_string_is_one_stop_string_and_lists_are_taken() -> None:
    assert SamplingParams(stop="abc") == SamplingParams(stop=["abc"]) == SamplingParams(stop=("abc",))  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[3]).stop_token_ids == (3,)  # type: ignore[arg-type]
