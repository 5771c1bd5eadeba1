"""The OpenAI protocol as the official client and its types see it."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai.types as oai
import openai.types.chat as oai_chat
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import AutoTokenizer

from stepladder import LLM, SamplingParams
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.learning.lessons import Captured
from stepladder.workers.text.stream import TextStream
from tests.cluster.models import CYCLE
from tests.cluster.serving import Server, eventually, serve, strict

pytestmark = pytest.mark.timeout(60)
GREEDY: dict[str, Any] = {"model": "org/tiny", "temperature": 0}
HELLO: dict[str, Any] = {**GREEDY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24}


def text(server: Server, **body: Any) -> str:
    return server.client().completions.create(**{**GREEDY, **body}).choices[0].text


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    strict(oai.Model, client.models.retrieve("org/tiny").to_dict(), extra=("max_model_len", "parent", "root"))


def test_completion_is_what_llm_generates(server: Server, llm: LLM) -> None:
    expected = llm.generate(["def f():"], SamplingParams(max_tokens=40, temperature=0.0))[0]
    body = server.post("/v1/completions", {**GREEDY, "prompt": "def f():", "max_tokens": 40}).json()
    strict(oai.Completion, body)
    assert body["choices"][0]["text"] == expected.text
    cached = body["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 40, "total_tokens": 48} and cached == 0


def test_a_prompt_sent_again_is_cached(server: Server) -> None:
    body = {**GREEDY, "prompt": "a prompt that fills several blocks of the cache", "max_tokens": 4}
    first, second = (server.post("/v1/completions", body).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
    assert cached == [0, 32], "two whole blocks of 16"


def test_chat_is_what_llm_generates(server: Server, llm: LLM) -> None:
    prompt = "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>"
    expected = llm.generate([prompt], SamplingParams(max_tokens=24, temperature=0.0))[0]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    body = server.post("/v1/chat/completions", {**HELLO, "messages": messages}).json()
    strict(oai_chat.ChatCompletion, body)
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["usage"]["prompt_tokens"] == len(llm.tokenizer.encode(prompt))


def test_defaults_of_max_tokens(server: Server, bundled: Server) -> None:
    assert server.client().completions.create(model="org/tiny", prompt="a", seed=1).usage.completion_tokens == 16
    limit = bundled.service.config.max_model_len
    near = [65] * (limit - 3)
    assert bundled.client().completions.create(**GREEDY, prompt=near).usage.total_tokens == limit
    chat = bundled.client().chat.completions.create(
        **GREEDY, messages=[{"role": "user", "content": "x" * (limit - 60)}, {"role": "assistant", "content": "y"}]
    )
    assert chat.choices[0].finish_reason == "length"
    assert chat.usage.total_tokens == limit, "a chat fills the context"


def test_chat_stream(server: Server) -> None:
    whole = server.post("/v1/chat/completions", HELLO).json()
    chunks = server.events("/v1/chat/completions", {**HELLO, "stream_options": {"include_usage": True}})
    for chunk in chunks:
        strict(oai_chat.ChatCompletionChunk, chunk)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert deltas[-1] == {} and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]


def test_completion_stream(server: Server) -> None:
    body = {**GREEDY, "prompt": ["one", "two"], "n": 2, "max_tokens": 12, "temperature": 1, "seed": 5}
    whole = server.post("/v1/completions", body).json()
    chunks = server.events("/v1/completions", {**body, "stream_options": {"continuous_usage_stats": True}})
    texts, ends, counts = [""] * 4, [None] * 4, []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        counts.append(chunk["usage"]["completion_tokens"])
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
        # OpenAI's API sends null until the end, which its type for whole completions does not allow
        strict(oai.Completion, {**chunk, "choices": [{**choice, "finish_reason": choice["finish_reason"] or "stop"}]})
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]
    assert counts == sorted(counts) and counts[-1] == whole["usage"]["completion_tokens"]


def test_async_client_streams_side_by_side(server: Server, llm: LLM) -> None:
    prompts = [f"prompt {n}" for n in range(8)]

    async def one(client: Any, prompt: str) -> str:
        stream = await client.completions.create(**GREEDY, prompt=prompt, max_tokens=20, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    expected = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0.0))
    assert asyncio.run(everything()) == [completion.text for completion in expected]


def test_prompts_may_be_tokens_and_many(server: Server, llm: LLM) -> None:
    prompts = ["first", "the second one"]
    tokens = [llm.tokenizer.encode(prompt) for prompt in prompts]
    expected = [text(server, prompt=prompt) for prompt in prompts]
    assert [text(server, prompt=ids) for ids in tokens] == expected
    for several in (prompts, tokens):
        answer = server.client().completions.create(**GREEDY, prompt=several)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
        assert answer.usage.prompt_tokens == sum(map(len, tokens))


def test_seeds(server: Server) -> None:
    def sampled(**body: Any) -> list[str]:
        answer = server.client().completions.create(model="org/tiny", prompt=["a", "b"], **body)
        return [choice.text for choice in answer.choices]

    a0, a1, b0, b1 = sampled(seed=2**63 - 1, n=2)
    assert [a0, b0] == sampled(seed=2**63 - 1)
    assert [a1, b1] == sampled(seed=-(2**63)), "the nth choice of a prompt has seed + n, in 64 bits"
    assert sampled() != sampled(), "without a seed every request draws its own"


def test_temperature_and_top_p(server: Server) -> None:
    greedy = text(server, prompt="a")
    assert text(server, prompt="a", temperature=2, top_p=1e-9, seed=1) == greedy
    assert text(server, prompt="a", temperature=2, seed=1) != greedy


def test_end_of_sequence_and_ignore_eos(server: Server) -> None:
    body = {"model": "org/tiny", "prompt": "a", "temperature": 2, "seed": 3, "n": 16, "max_tokens": 100}
    client = server.client()
    some = client.completions.create(**body)
    assert {choice.finish_reason for choice in some.choices} == {"stop", "length"}
    every = client.completions.create(**body, extra_body={"ignore_eos": True})
    assert {choice.finish_reason for choice in every.choices} == {"length"}
    assert every.usage.completion_tokens == 1600 > some.usage.completion_tokens
    for stopped, longer in zip(some.choices, every.choices, strict=True):
        assert longer.text.startswith(stopped.text.rstrip("\ufffd"))


@pytest.mark.parametrize("name", ["cycle", "bundled"])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["日🚀"], "aé"),
        ("z. aé", "aé日🚀"),
        (["nothing", "🚀z", "é日"], "a"),
        ([". a", "z. aé日🚀"], "aé日🚀z"),
        (["a"], ""),
        (["z. b"], CYCLE * 2),
    ],
)
def test_stop_strings(name: str, stop: Any, kept: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(name)
    size = len(CYCLE.encode())
    body = {**GREEDY, "prompt": CYCLE, "stop": stop, "max_tokens": 2 * size}
    whole = server.client().completions.create(**body)
    choice = whole.choices[0]
    assert (choice.text, choice.finish_reason) == (kept, "length" if kept == CYCLE * 2 else "stop")
    chunks = server.events("/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == kept
    needed = next(n for n in range(1, 2 * size + 1) if ends_by(server, stop, n) or n == 2 * size)
    assert whole.usage.completion_tokens == needed, "tokens behind the stop string do not count"


def ends_by(server: Server, stop: Any, count: int) -> bool:
    """Whether the first `count` tokens hold a stop string."""
    stream = TextStream(server.service.tokenizer, (stop,) if isinstance(stop, str) else tuple(stop))
    stream.push(stream.tokenizer.encode(CYCLE * 2)[:count])
    return stream.stopped


def test_characters_of_several_tokens_arrive_whole(cycle: Server) -> None:
    chunks = cycle.events("/v1/completions", {**GREEDY, "prompt": CYCLE, "max_tokens": 3 * len(CYCLE.encode())})
    pieces = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert pieces == list(CYCLE * 3)


def test_a_broken_last_character_is_shown(cycle: Server) -> None:
    body = {**GREEDY, "prompt": CYCLE, "max_tokens": 7}  # a, é, 日, and one of 🚀's four bytes
    assert cycle.client().completions.create(**body).choices[0].text == "aé日\ufffd"
    assert "".join(c["choices"][0]["text"] for c in cycle.events("/v1/completions", body)) == "aé日\ufffd"


def test_tokenize_and_back(server: Server, llm: LLM) -> None:
    for body, plain in (
        ({"prompt": "<|user|>é"}, "<|user|>é"),
        ({"messages": HELLO["messages"], "model": "org/tiny"}, "<|user|>hello<|end|><|assistant|>"),
        ({"prompt": "long " * 2000}, "long " * 2000),
    ):
        answer = server.post("/tokenize", body).json()
        assert answer["tokens"] == llm.tokenizer.encode(plain)
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 1024)
        assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": plain}


def test_an_answer_can_be_sent_back_with_its_null_fields(server: Server) -> None:
    client = server.client()
    message = client.chat.completions.create(**{**HELLO, "max_tokens": 4}).choices[0].message
    again = [*HELLO["messages"], message, {"role": "user", "content": "and?", "name": "me"}]
    assert client.chat.completions.create(**{**HELLO, "messages": again}).choices[0].finish_reason


def test_routes_are_described(server: Server) -> None:
    """What is documented is what is sent: statuses, bodies, content types."""
    document = httpx.get(server.url + "/openapi.json").json()
    paths = document["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= paths.keys()
    assert httpx.get(server.url + "/version").json() == {"version": "1"}
    chat = paths["/v1/chat/completions"]["post"]
    assert chat["responses"].keys() == {"200", "400", "401", "404", "413", "429", "503"}
    assert chat["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == [CONTENT_TYPE_LATEST]
    assert "422" not in json.dumps(document) and "HTTPValidationError" not in json.dumps(document)
    schemas = document["components"]["schemas"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"messages", "temperature", "timeout"} <= schemas["ChatRequest"]["properties"].keys()
    for kind in ("ChatRequest", "CompletionRequest"):
        assert schemas[kind]["properties"]["metadata"]["type"] == "object"
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in schemas, "every reference leads somewhere"
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).headers["content-type"] == "application/json"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("metadata", "domain"),
    [
        ({"domain": "tables", "learn": "true", "mine": "x" * 512}, "tables"),
        ({"domain": "d" * 64, "learn": True}, "d" * 64),
        ({str(n) * 64: "é\n" for n in range(1, 10)} | {"": ""}, ""),
        ({}, ""),
        (None, ""),
        ({"domain": "tables", "learn": "false"}, None),
        ({"learn": False}, None),
    ],
    ids=str,
)
def test_metadata_say_what_is_learnt(
    server: Server, path: str, metadata: dict[str, Any] | None, domain: str | None, stream: bool
) -> None:
    """Of all choices, as what the engine captures says; None: nothing is."""
    captured, engine = list[Captured](), server.backend.engine
    body: dict[str, Any] = {"model": "org/tiny", "max_tokens": 6, "n": 2, "seed": 1, "metadata": metadata}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": ["hi", "ho"]}
    engine.capture = Capture(captured.append)
    try:
        if stream:
            assert {one["index"] for chunk in server.events(path, body) for one in chunk["choices"]}
        else:
            assert server.post(path, body).status_code == 200
        eventually(lambda: not server.running)
    finally:
        engine.capture = None
    choices = 2 if "chat" in path else 4
    assert [one.domain for one in captured] == ([] if domain is None else [domain] * choices)
    assert len({one.request for one in captured}) == len(captured)


def test_head_is_answered_as_get_without_a_body(server: Server) -> None:
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and not answer.content and int(answer.headers["content-length"]) > 0
    assert httpx.head(server.url + "/v1/completions").status_code == 405


def test_vllms_clients_find_the_tokenizer(random_model: Path, server: Server) -> None:
    with serve(random_model, root=str(random_model)) as rooted:
        assert httpx.get(rooted.url + "/v1/models").json()["data"][0]["root"] == str(random_model)
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["root"] == "org/tiny"


def test_tokenizer_info(random_model: Path, server: Server) -> None:
    """vLLM's, and what lm-eval's remote tokenizer asks for; transformers is the oracle."""
    oracle = AutoTokenizer.from_pretrained(random_model)
    with serve(random_model, tokenizer_info=True) as shown:
        info = httpx.get(shown.url + "/tokenizer_info").json()
        assert isinstance(info["tokenizer_class"], str)
        assert (info["chat_template"], info["eos_token"]) == (oracle.chat_template, oracle.eos_token)
        payload = {"prompt": info["eos_token"], "add_special_tokens": False}
        assert shown.post("/tokenize", payload).json()["tokens"] == [oracle.eos_token_id]
    assert httpx.get(server.url + "/tokenizer_info").status_code == 404, "only where the operator asks for it"
