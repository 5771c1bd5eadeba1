"""Every refusal: its status, and its body in OpenAI's shape, naming the field."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from stepladder.cluster.gateway.api_keys import ApiKeys
from stepladder.cluster.gateway.protocol import ANYTHING, ChatRequest, CompletionRequest
from tests.cluster.serving import Server, serve

pytestmark = pytest.mark.timeout(60)
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    COMPLETION: {"model": "org/tiny", "prompt": "hi", "max_tokens": 2},
}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]


def check(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": "x" * 1000}, "stop"),
        ({"stop": ["x" * 250] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 7}, "stop"),
        ({"stop": [7]}, "stop[0]"),
        ({"stop": "\ud800"}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
        ({"model": None}, "model"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": ["3"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"metadata": "tables"}, "metadata"),
        ({"metadata": [["domain", "tables"]]}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"n" * 65: ""}}, "metadata"),
        ({"metadata": {"mine": "v" * 513}}, "metadata"),
        ({"metadata": {"mine": 7}}, "metadata"),
        ({"metadata": {"mine": True}}, "metadata"),
        ({"metadata": {"mine": None}}, "metadata"),
        ({"metadata": {"mine": "\ud800"}}, "metadata"),
        ({"metadata": {"\ud800": ""}}, "metadata"),
        ({"metadata": {"domain": ""}}, "metadata.domain"),
        ({"metadata": {"domain": "two words"}}, "metadata.domain"),
        ({"metadata": {"domain": "tables\n"}}, "metadata.domain"),
        ({"metadata": {"domain": "d" * 65}}, "metadata.domain"),
        ({"metadata": {"domain": True}}, "metadata"),
        ({"metadata": {"learn": "False"}}, "metadata.learn"),
        ({"metadata": {"learn": "no"}}, "metadata.learn"),
        ({"metadata": {"learn": 0}}, "metadata"),
        ({"metadata": {"learn": None}}, "metadata"),
        ({"colour": "red"}, "colour"),
        ({"colour": None}, "colour"),
        ({"col\ud800our": 1}, None),
    ],
)
def test_bad_fields(server: Server, path: str, change: dict[str, Any], param: str | None) -> None:
    content = json.dumps({**BODIES[path], **change})
    answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
    check(answer, 400, param)


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [7]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "mood": "good"}]}, "messages[0].mood"),
        (CHAT, {"messages": [{"role": "tool", "content": "the template refuses"}]}, "messages"),
        (CHAT, {"max_completion_tokens": 3}, None),
        (CHAT, {"prompt": "hi"}, "prompt"),
        (COMPLETION, {"prompt": None}, "prompt"),
        (COMPLETION, {"prompt": ""}, "prompt"),
        (COMPLETION, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": [[]]}, "prompt"),
        (COMPLETION, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETION, {"prompt": [1, 100000]}, "prompt"),
        (COMPLETION, {"prompt": [-1]}, "prompt"),
        (COMPLETION, {"prompt": "\ud800"}, "prompt"),
        (COMPLETION, {"prompt": ["a"] * 100, "n": 2}, "n"),
        (COMPLETION, {"logprobs": 21}, "logprobs"),
        (COMPLETION, {"logprobs": -1}, "logprobs"),
        (COMPLETION, {"logprobs": True}, "logprobs"),
        (COMPLETION, {"top_logprobs": 1}, "top_logprobs"),
        (COMPLETION, {"echo": "yes"}, "echo"),
        (COMPLETION, {"best_of": 2}, "best_of"),
        (COMPLETION, {"prompt": "x" * 1024, "echo": True, "max_tokens": 0}, "prompt"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        ("/tokenize", {}, None),
        ("/detokenize", {"tokens": [100000]}, "tokens"),
    ],
)
def test_bad_fields_of_one_endpoint(server: Server, path: str, change: dict[str, Any], param: str | None) -> None:
    content = json.dumps({**BODIES.get(path, {}), **change})
    check(httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}), 400, param)


@pytest.mark.parametrize(("path", "kind"), [(CHAT, ChatRequest), (COMPLETION, CompletionRequest)])
def test_unsupported_parameters(server: Server, path: str, kind: Any) -> None:
    """Each is refused by name, and fine at every neutral value and at null."""
    client = httpx.Client(base_url=server.url)
    for name, neutral in kind.NEUTRAL.items():
        for value in (None, *("label" if value is ANYTHING else value for value in neutral)):
            answer = client.post(path, json={**BODIES[path], "max_tokens": 1, name: value})
            assert answer.status_code == 200, (name, value, answer.text)
        if ANYTHING not in neutral:
            answer = client.post(path, json={**BODIES[path], name: "something else"})
            check(answer, 400, name, "unsupported_parameter")
    for name, value in (("best_of", True), ("top_k", False)):
        check(client.post(path, json={**BODIES[path], name: value}), 400, name)  # neither is true 1, nor false 0


def test_context_length(server: Server) -> None:
    error = check(server.post(COMPLETION, {**BODIES[COMPLETION], "prompt": "x" * 1024}), 400, "prompt")
    assert error["code"] == "context_length_exceeded" and "1024" in error["message"]
    answer = server.post(CHAT, {**BODIES[CHAT], "max_tokens": 1020})
    error = check(answer, 400, "messages", "context_length_exceeded")
    assert all(number in error["message"] for number in ("1024", "1020", "5"))


def test_broken_bodies(server: Server) -> None:
    typed = {"Content-Type": "application/json"}
    check(httpx.post(server.url + CHAT, content='{"model": ', headers=typed), 400, None, "invalid_json")
    check(httpx.post(server.url + CHAT, content=b"\xff\xfe{", headers=typed), 400, None)
    check(httpx.post(server.url + CHAT, content="[" * 100_000, headers=typed), 400, None)
    check(httpx.post(server.url + CHAT, headers=typed), 400, None)
    check(httpx.post(server.url + CHAT, content="[]", headers=typed), 400, None)
    untyped = check(httpx.post(server.url + CHAT, content=json.dumps(BODIES[CHAT])), 400, None)
    assert "Content-Type: application/json" in untyped["message"]


@pytest.mark.parametrize("levels", [101, 500, *range(950, 1000, 7)])
@pytest.mark.parametrize("padding", [0, 9000])
def test_deeply_nested_bodies(server: Server, levels: int, padding: int) -> None:
    """Also just below the depth at which Python gives up, here and in a thread."""
    deep = "[" * (levels - 2) + "]" * (levels - 2)
    function = f'{{"name": "f", "parameters": {{"a": {deep}}}}}'
    ways: list[tuple[str, str, str, str | None]] = [
        (CHAT, "chat_template_kwargs", f'{{"a": {deep}}}', None),
        ("/tokenize", "chat_template_kwargs", f'{{"a": {deep}}}', None),
        (CHAT, "tools", f'[{{"type": "function", "function": {function}}}]', None),
        ("/tokenize", "tools", f'[{{"type": "function", "function": {function}}}]', None),
        (CHAT, "guided_json", json.dumps(f'{{"a": [{deep}]}}'), "guided_json"),
        (COMPLETION, "structured_outputs", json.dumps({"json": f'{{"a": [{deep}]}}'}), "structured_outputs"),
    ]
    for path, name, value, param in ways:
        begin = json.dumps(BODIES.get(path) or {"messages": BODIES[CHAT]["messages"]})[:-1]
        content = f'{begin}, "{name}": {value}}}' + " " * padding
        answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
        assert "is nested too deeply; at most 100 levels" in check(answer, 400, param)["message"]


def test_what_is_nested_less_is_read(server: Server) -> None:
    deep = json.loads("[" * 98 + "]" * 98)
    body = {"messages": BODIES[CHAT]["messages"], "chat_template_kwargs": {"a": deep}}
    assert server.post("/tokenize", body).status_code == 200


def test_unknown_model_and_routes(server: Server) -> None:
    for path, body in BODIES.items():
        check(server.post(path, {**body, "model": "gpt-9"}), 404, "model", "model_not_found")
    check(httpx.get(server.url + "/v1/models/gpt-9"), 404, "model", "model_not_found")
    check(httpx.get(server.url + "/v1/embeddings"), 404, None)
    check(httpx.get(server.url + CHAT), 405, None)


def test_the_client_raises_its_own_errors(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**BODIES[CHAT], tools=[{"type": "function"}])
    assert refused.value.param == "tools[0].function"


def test_body_size(random_model: Path) -> None:
    with serve(random_model, max_body_bytes=1000) as server:
        assert server.post(COMPLETION, BODIES[COMPLETION]).status_code == 200
        check(server.post(COMPLETION, {**BODIES[COMPLETION], "prompt": "x" * 1000}), 413, None, "request_too_large")
        chunks = (b" " * 600 for _ in range(2))
        answer = httpx.post(server.url + COMPLETION, content=chunks, headers={"Content-Type": "application/json"})
        check(answer, 413, None, "request_too_large")


def test_api_key(random_model: Path) -> None:
    with serve(random_model, api_key="sécret") as server:
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(server.url + path).status_code == 200
        wrong: list[Any] = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sécret".encode()}]
        for header in wrong:
            check(httpx.get(server.url + "/v1/models", headers=header), 401, None, "invalid_api_key")
            check(httpx.post(server.url + CHAT, content="{", headers=header), 401, None)
            check(httpx.get(server.url + "/nowhere", headers=header), 401, None)
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="other").models.list()
        right: Any = {"Authorization": "Bearer sécret".encode()}
        assert httpx.post(server.url + CHAT, json=BODIES[CHAT], headers=right).status_code == 200


def hashed(*keys: str) -> str:
    return "".join(f"sha256:{sha256(key.encode()).hexdigest()} of {index}\n" for index, key in enumerate(keys))


def test_api_keys_of_a_file(random_model: Path, tmp_path: Path) -> None:
    """Any of them opens, and none that has been taken out."""
    file = tmp_path / "keys"
    file.write_text("# ours\n\n" + hashed("one", "two"))

    def status(key: str) -> int:
        return httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    with serve(random_model, api_key="given", api_key_file=str(file)) as server:
        assert [status(key) for key in ("one", "two", "given", "three")] == [200, 200, 200, 401]
        file.write_text(hashed("two"))
        assert [status(key) for key in ("one", "two")] == [401, 200]
        file.write_text(hashed("one", "two"))
        assert status("one") == 200
        file.write_text("sha256:half a li")
        assert [status(key) for key in ("one", "three")] == [200, 401], "somebody edits it"
        file.write_text(hashed("three"))
        assert [status(key) for key in ("three", "one", "given")] == [200, 401, 200]


@pytest.mark.parametrize(
    ("text", "why"), [("secret\n", "line 1 is not sha256:"), ("", "holds no key"), (None, "No such file")]
)
def test_api_key_files_that_are_none(tmp_path: Path, text: str | None, why: str) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=f"gateway.api_key_file .*/keys: .*{why}"):
        ApiKeys(file=str(tmp_path / "keys"))


def test_overload(random_model: Path) -> None:
    with serve(random_model, max_in_flight=1) as server:
        answer = server.post(COMPLETION, {**BODIES[COMPLETION], "prompt": ["a", "b"], "stream": True})
        assert check(answer, 429, None, "rate_limit_exceeded")["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(**{**BODIES[COMPLETION], "prompt": ["a", "b"]})
        assert server.client().completions.create(**BODIES[COMPLETION]).choices[0].finish_reason == "length"
