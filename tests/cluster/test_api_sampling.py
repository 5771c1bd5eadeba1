"""Every sampling parameter and both shapes of logprobs, through the official client, against `LLM` and by hand."""

from math import nan
from pathlib import Path
from typing import Any

import openai.types as oai
import openai.types.chat as oai_chat
import pytest
import torch

from stepladder import LLM, SamplingParams
from stepladder.workers import sampler
from stepladder.workers.logprobs import Judged, judge
from tests.cluster.models import CYCLE
from tests.cluster.serving import Server, serve, strict

pytestmark = pytest.mark.timeout(60)
PROMPT = "def f():"
BODY: dict[str, Any] = {"model": "org/tiny", "prompt": PROMPT, "max_tokens": 20, "seed": 7, "temperature": 1}
GREEDY: dict[str, Any] = {**BODY, "temperature": 0}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hé"}], "model": "org/tiny", "max_tokens": 20}
CHAT_PROMPT = "<|user|>hé<|end|><|assistant|>"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 3},
        {"top_k": -1},
        {"min_p": 0.3},
        {"repetition_penalty": 1.9},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"logit_bias": {"65": 100, "66": 99.5}},
        {"stop_token_ids": list(range(0, 250, 3))},
        {"stop_token_ids": list(range(0, 250, 3)), "min_tokens": 15},
        {"stop_token_ids": list(range(0, 250, 3)), "include_stop_str_in_output": True},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": -1},
    ],
    ids=str,
)
def test_each_parameter_does_what_it_does_in_llm(server: Server, llm: LLM, fields: dict[str, Any]) -> None:
    params = dict(fields)
    if "logit_bias" in params:
        params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
    if "stop_token_ids" in params:
        params["stop_token_ids"] = tuple(params["stop_token_ids"])
    wanted, plain = (
        llm.generate([PROMPT], SamplingParams(max_tokens=20, seed=7, **given))[0] for given in (params, {})
    )
    client = server.client()
    native = {k: v for k, v in fields.items() if k in ("presence_penalty", "frequency_penalty", "logit_bias")}
    extra = {k: v for k, v in fields.items() if k not in native}
    got = client.completions.create(**BODY, **native, extra_body=extra)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (wanted.text, wanted.finish_reason)
    assert got.usage.completion_tokens == len(wanted.tokens)
    assert wanted.text != plain.text or fields == {"top_k": -1}
    [chat] = llm.generate([CHAT_PROMPT], SamplingParams(max_tokens=20, seed=7, **params))
    answer = client.chat.completions.create(**HELLO, seed=7, **native, extra_body=extra)
    assert answer.choices[0].message.content == chat.text
    stream = client.completions.create(**BODY, **native, extra_body=extra, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted.text


def test_n_with_seeds_and_penalties(server: Server) -> None:
    body = {**BODY, "extra_body": {"repetition_penalty": 1.3, "top_k": 20}, "logprobs": 0}
    several = server.client().completions.create(**body, n=3).choices
    for nth, choice in enumerate(several):
        [alone] = server.client().completions.create(**{**body, "seed": 7 + nth}).choices
        assert (alone.text, alone.logprobs.tokens) == (choice.text, choice.logprobs.tokens)
        assert alone.logprobs.token_logprobs == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    assert len({choice.text for choice in several}) == 3


def text_of(token: str) -> bytes:
    """A token as it is written in logprobs, as bytes."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def near(values: list[Any]) -> Any:
    return pytest.approx(values, abs=1e-4)


def test_completion_logprobs(server: Server, llm: LLM) -> None:
    wanted = llm.generate([PROMPT], SamplingParams(max_tokens=20, seed=7, logprobs=3))[0]
    body = server.post(COMPLETION, {**BODY, "logprobs": 3}).json()
    strict(oai.Completion, body)
    found, scored = body["choices"][0]["logprobs"], wanted.logprobs or []
    assert [text_of(token) for token in found["tokens"]] == list(map(llm.tokenizer.bytes_of, wanted.tokens))
    assert found["token_logprobs"] == near([one.logprob for one in scored])
    for top, token, one in zip(found["top_logprobs"], found["tokens"], scored, strict=True):
        assert len(top) == 3 + (one.rank > 3) and top[token] == near(one.logprob)  # type: ignore[arg-type]
        assert list(top.values())[:3] == near(one.top_logprobs)
    offsets, text = found["text_offset"], body["choices"][0]["text"]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, begin, end in zip(found["tokens"], offsets, offsets[1:], strict=False):
        if not token.startswith(("bytes:", "<|")):
            assert text[begin:end].startswith(token) or "\ufffd" in text[begin:end]
    assert server.post(COMPLETION, BODY).json()["choices"][0]["logprobs"] is None


def test_text_offsets_count_characters(cycle: Server) -> None:
    body = {**GREEDY, "prompt": CYCLE, "max_tokens": len(CYCLE.encode()), "logprobs": 0}
    offsets = cycle.client().completions.create(**body).choices[0].logprobs.text_offset
    assert offsets == [at for at, char in enumerate(CYCLE) for _ in char.encode()]


@pytest.mark.parametrize("name", ["server", "cycle", "bundled"])
def test_a_stream_carries_the_same_logprobs(name: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(name)
    for change in ({}, {"stop": "日🚀z"}, {"echo": True}, {"n": 2, "echo": True, "prompt": ["ab", "é"]}):
        body = {**GREEDY, "prompt": CYCLE, "max_tokens": 30, "logprobs": 2, **change}
        whole = server.post(COMPLETION, body).json()["choices"]
        texts, found = [""] * len(whole), [dict[str, list[Any]]() for _ in whole]
        for chunk in server.events(COMPLETION, body):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
            assert choice["finish_reason"] or choice["logprobs"]["tokens"], "a token comes with its text or after it"
            for key, values in (choice["logprobs"] or {}).items():
                found[choice["index"]].setdefault(key, []).extend(values)
        for choice, text, logprobs in zip(whole, texts, found, strict=True):
            assert choice["text"] == text and choice["logprobs"].keys() == logprobs.keys()
            for key in ("tokens", "text_offset"):
                assert choice["logprobs"][key] == logprobs[key]
            begin = logprobs["token_logprobs"].count(None)
            assert choice["logprobs"]["token_logprobs"][begin:] == near(logprobs["token_logprobs"][begin:])


def test_chat_logprobs(server: Server, llm: LLM) -> None:
    wanted = llm.generate([CHAT_PROMPT], SamplingParams(max_tokens=20, seed=1, logprobs=2))[0]
    body = {**HELLO, "seed": 1, "logprobs": True, "top_logprobs": 2}
    answer = server.post(CHAT, body).json()
    strict(oai_chat.ChatCompletion, answer)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == list(map(llm.tokenizer.bytes_of, wanted.tokens))
    assert [text_of(entry["token"]) for entry in content] == [bytes(entry["bytes"]) for entry in content]
    for entry, one in zip(content, wanted.logprobs or [], strict=True):
        assert entry["logprob"] == near(one.logprob)  # type: ignore[arg-type]
        assert [top["logprob"] for top in entry["top_logprobs"]] == near(one.top_logprobs)
        assert [bytes(top["bytes"]) for top in entry["top_logprobs"]] == [*map(llm.tokenizer.bytes_of, one.top_tokens)]
    streamed = []
    for chunk in server.events(CHAT, body):
        strict(oai_chat.ChatCompletionChunk, chunk)
        streamed += (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    assert [entry["logprob"] for entry in streamed] == near([entry["logprob"] for entry in content])
    chosen = server.client().chat.completions.create(**HELLO, seed=1, logprobs=True).choices[0].logprobs.content
    assert all(entry.top_logprobs == [] for entry in chosen) and len(chosen) == len(content)
    assert server.post(CHAT, HELLO).json()["choices"][0]["logprobs"] is None


def test_echo(server: Server, llm: LLM) -> None:
    client, ids = server.client(), llm.tokenizer.encode("<|user|>é<|end|>x")
    plain = client.completions.create(**{**GREEDY, "prompt": "<|user|>é<|end|>x"}).choices[0].text
    echoed = client.completions.create(**{**GREEDY, "prompt": "<|user|>é<|end|>x"}, echo=True)
    assert echoed.choices[0].text == "<|user|>é<|end|>x" + plain
    assert client.completions.create(**{**GREEDY, "prompt": ids}, echo=True).choices[0].text == "éx" + plain
    wanted = llm.generate([PROMPT], SamplingParams(max_tokens=3, temperature=0.0, logprobs=1, prompt_logprobs=1))[0]
    body = server.post(COMPLETION, {**GREEDY, "max_tokens": 3, "echo": True, "logprobs": 1}).json()
    found, tokens = body["choices"][0]["logprobs"], [*llm.tokenizer.encode(PROMPT), *wanted.tokens]
    scored = [*(wanted.prompt_logprobs or []), *(wanted.logprobs or [])]
    assert [text_of(token) for token in found["tokens"]] == list(map(llm.tokenizer.bytes_of, tokens))
    assert found["token_logprobs"] == [None, *(near(one.logprob) for one in scored[1:] if one)]  # type: ignore[arg-type]
    assert found["top_logprobs"][0] is None and found["text_offset"][: len(PROMPT) + 1] == [*range(len(PROMPT) + 1)]
    assert body["usage"]["completion_tokens"] == 3


def test_a_prompt_can_be_scored_alone(server: Server) -> None:
    """As lm-eval asks for a text's likelihood."""
    whole = server.post(COMPLETION, {**GREEDY, "echo": True, "logprobs": 1, "max_tokens": 1}).json()["choices"][0]
    body = {**GREEDY, "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = server.post(COMPLETION, body).json()
    scored = answer["choices"][0]
    strict(oai.Completion, server.post(COMPLETION, {**body, "logprobs": None}).json())
    assert scored["text"] == PROMPT and scored["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 8
    for key, values in scored["logprobs"].items():
        if key != "top_logprobs":
            assert values[1:] == (near if key == "token_logprobs" else list)(whole["logprobs"][key][1:-1])
    chunks = server.events(COMPLETION, body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT
    error = server.post(COMPLETION, {**body, "echo": False}).json()["error"]
    assert error["param"] == "max_tokens"


def test_prompt_logprobs(server: Server, llm: LLM) -> None:
    """vLLM's shape: by token id, null first; per choice for completions, once for a chat."""
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    extra = {"prompt_logprobs": 2}
    completion = server.client().completions.create(**{**GREEDY, "max_tokens": 2, "n": 2}, extra_body=extra)
    chat = server.client().chat.completions.create(**{**HELLO, "max_tokens": 2}, extra_body=extra)
    for prompt, several in (
        (PROMPT, [choice.model_extra["prompt_logprobs"] for choice in completion.choices]),
        (CHAT_PROMPT, [chat.model_extra["prompt_logprobs"]]),
    ):
        wanted = llm.generate([prompt], params)[0].prompt_logprobs or []
        tokens = llm.tokenizer.encode(prompt)
        for shaped in several:
            assert shaped[0] is None and len(shaped) == len(tokens)
            for entries, token, one in zip(shaped[1:], tokens[1:], wanted[1:], strict=True):
                assert one and {int(t) for t in entries} == {token, *one.top_tokens}
                mine = entries[str(token)]
                assert (mine["logprob"], mine["rank"]) == (near(one.logprob), one.rank)  # type: ignore[arg-type]
                assert text_of(mine["decoded_token"]) == llm.tokenizer.bytes_of(token)
                assert [entries[str(t)]["rank"] for t in one.top_tokens] == [1, 2]
    fewer = server.client().completions.create(**GREEDY, echo=True, logprobs=4, extra_body={"prompt_logprobs": 0})
    assert all(len(entries) == 1 for entries in fewer.choices[0].model_extra["prompt_logprobs"][1:])


def test_stop_strings_can_stay_and_wait(cycle: Server) -> None:
    client = cycle.client()
    body = {**GREEDY, "prompt": CYCLE, "stop": "日🚀", "max_tokens": 40}
    assert client.completions.create(**body).choices[0].text == "aé"
    kept = client.completions.create(**body, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert (kept.text, kept.finish_reason) == ("aé日🚀", "stop")
    later = client.completions.create(**body, extra_body={"min_tokens": len(CYCLE.encode())}).choices[0]
    assert later.text == CYCLE + "aé"


def test_defaults_of_the_server(random_model: Path, llm: LLM) -> None:
    """They hold where a request says nothing; its null is nothing, its neutral value is not."""
    defaults = SamplingParams(top_k=2, repetition_penalty=1.4, temperature=0.6)
    wanted = llm.generate([PROMPT], SamplingParams(max_tokens=20, seed=7, **{"top_k": 2, "temperature": 1.0}))[0]
    with serve(random_model, defaults=defaults) as server:
        got = server.client().completions.create(**BODY, extra_body={"repetition_penalty": 1, "top_k": None})
    assert got.choices[0].text == wanted.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_whose_logits_are_not_numbers(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """Answers are alike, whole and streamed: OpenAI's lowest figure. The log says once which model it is."""
    monkeypatch.setattr(sampler, "judge", lambda *args: Judged(*(torch.full_like(t, nan) if t.is_floating_point() else t
                                                               for t in judge(*args))))  # fmt: skip
    body = {**GREEDY, "max_tokens": 3, "logprobs": 2}
    with serve(random_model) as server:
        for _ in range(2):
            if stream:
                chunks = server.events(COMPLETION, body)
                found = [x for c in chunks for x in (c["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
            else:
                found = server.post(COMPLETION, body).json()["choices"][0]["logprobs"]["token_logprobs"]
            assert found == [-9999.0] * 3
        chat = server.post(CHAT, {**HELLO, "max_tokens": 1, "logprobs": True, "top_logprobs": 1}).json()
        (entry,) = chat["choices"][0]["logprobs"]["content"]
        assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
    said = [record.message for record in caplog.records if "not numbers" in record.message]
    assert said == ["model org/tiny: its logits are not numbers (NaN); check its weights"]
