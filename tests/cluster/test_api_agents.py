"""response_format, vLLM's structured outputs, tools and CORS, through the official client, whole and in streams."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import openai.types.chat as oai_chat
import pydantic
import pytest

from stepladder.cluster.config import GatewayConfig
from tests.cluster.models import write_tokenizer
from tests.cluster.serving import Server, serve, strict
from tests.llama import write_llama
from tests.workers.test_grammar import HOSTILE, SCHEMA

pytestmark = pytest.mark.timeout(120)
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "org/tiny", "messages": [{"role": "user", "content": "hé"}], "max_tokens": 600}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "日本"]}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "of a city", "parameters": CITY | {"additionalProperties": False}}
TOOLS: list[Any] = [
    {"type": "function", "function": {**WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


HERMES = (
    "{% if tools %}<tool_call>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or () %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
LLAMA = (
    HERMES.replace('<tool_call>\n{"name"', '{"name"')
    .replace("\n</tool_call>", "")
    .replace("{% if tools %}<tool_call>", "{% if tools %}Respond in the format {x}")
)


def model(directory: Path, template: str) -> Path:
    eos = write_tokenizer(directory).token_to_id("<|end|>")
    config = {"chat_template": template, "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return write_llama(directory, vocab_size=300, eos_token_id=eos, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(model(tmp_path_factory.mktemp("hermes"), HERMES), vocab_size=300) as server:
        yield server


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(model(tmp_path_factory.mktemp("llama"), LLAMA), vocab_size=300) as server:
        yield server


def streamed(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a stream put together as a client would."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in server.events(CHAT, body):
        strict(oai_chat.ChatCompletionChunk, chunk)
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"content": "", "calls": {}, "reason": None})
            one["content"] += choice["delta"].get("content") or ""
            one["reason"] = choice["finish_reason"] or one["reason"]
            for delta in choice["delta"].get("tool_calls", ()):
                call = one["calls"].setdefault(delta["index"], {"name": "", "arguments": ""})
                call["name"] += delta["function"].get("name") or ""
                call["arguments"] += delta["function"]["arguments"]
                assert ("id" in delta) == ("name" in delta["function"]), "once, with the name"
    return [found[index] for index in sorted(found)]


def as_streamed(answer: dict[str, Any]) -> list[dict[str, Any]]:
    strict(oai_chat.ChatCompletion, answer)
    return [
        {
            "content": choice["message"]["content"] or "",
            "calls": dict(enumerate(call["function"] for call in choice["message"].get("tool_calls") or ())),
            "reason": choice["finish_reason"],
        }
        for choice in answer["choices"]
    ]


class Inner(pydantic.BaseModel):
    deep: list[bool] = pydantic.Field(max_length=2)


class Answer(pydantic.BaseModel):
    age: int = pydantic.Field(ge=0, le=9)
    inner: Inner | None


def test_json_schema(hermes: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    body = {**HELLO, "response_format": form, "n": 3, "seed": 5, "logprobs": True}
    whole = hermes.post(CHAT, body).json()
    for choice in whole["choices"]:
        assert choice["finish_reason"] == "stop" and choice["logprobs"]["content"]
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert streamed(hermes, body) == as_streamed(whole)
    parsed = hermes.client().chat.completions.parse(**HELLO, response_format=Answer, seed=3).choices[0].message.parsed
    assert isinstance(parsed, Answer) and parsed.age <= 9


def test_json_object_and_completions(hermes: Server) -> None:
    client = hermes.client()
    for seed in range(3):
        body = {**HELLO, "response_format": {"type": "json_object"}, "seed": seed}
        choice = client.chat.completions.create(**body).choices[0]
        assert choice.message.content.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
    plain = {"model": "org/tiny", "prompt": ["a", "b"], "max_tokens": 50, "seed": 1}
    text = [c.text for c in client.completions.create(**plain, extra_body={"guided_choice": ["yes", "no"]}).choices]
    assert set(text) <= {"yes", "no"}
    short = {**HELLO, "max_tokens": 5, "seed": 1}
    formats = ({"type": "text"}, {"type": "text", "json_schema": None})
    free = [hermes.post(CHAT, short | fields).json() for fields in ({}, *({"response_format": f} for f in formats))]
    assert free[0]["choices"] == free[1]["choices"] == free[2]["choices"]
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": 7}, "description": None}, "other": None}
    assert hermes.post(CHAT, short | {"response_format": schema}).json()["choices"][0]["message"]["content"] == "7"
    objects = ({"type": "json_object"}, {"type": "json_object", "json_schema": None})
    for stream in (False, True):
        asked = [{**short, "response_format": form, "stream": stream} for form in objects]
        one, other = (streamed(hermes, a) if stream else hermes.post(CHAT, a).json()["choices"] for a in asked)
        assert one == other


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["x", "y"], "disable_any_whitespace": False}}, "[xy]"),
        ({"structured_outputs": {"grammar": 'start: "q"'}}, "q"),
        ({"structured_outputs": {"json": {"const": 7}}}, "7"),
        ({"guided_regex": "c+d"}, "c+d"),
        ({"guided_json": '{"enum": [1, 2]}'}, "[12]"),
        ({"guided_grammar": 'root ::= "z"'}, "z"),
    ],
    ids=str,
)
def test_vllms_spellings(hermes: Server, fields: dict[str, Any], pattern: str) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETION, {"model": "org/tiny", "prompt": "a", "max_tokens": 600})):
        choice = hermes.post(path, {**body, **fields}).json()["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        jsonschema.validate(text, {"type": "string", "pattern": f"^({pattern})$"})


@pytest.mark.parametrize("name", ["hermes", "llama"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_tool_that_must_be_called(name: str, choice: Any, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(name)
    for seed in range(3):
        body = {**HELLO, "tools": TOOLS, "tool_choice": choice, "seed": seed, "n": 2, "parallel_tool_calls": False}
        found = as_streamed(server.post(CHAT, body).json())
        assert streamed(server, body) == found
        for one in found:
            assert one["reason"] == "tool_calls" and one["content"] == "" and len(one["calls"]) == 1
            call = one["calls"][0]
            assert call["name"] in (("get_weather",) if isinstance(choice, dict) else ("get_weather", "now"))
            schema = WEATHER["parameters"] if call["name"] == "get_weather" else {"const": {}}
            jsonschema.validate(json.loads(call["arguments"]), schema)


def test_several_calls_and_one_that_is_cut(hermes: Server) -> None:
    body = {**HELLO, "tools": TOOLS, "tool_choice": "required"}
    counts = set()
    for seed in range(6):
        [one] = as_streamed(hermes.post(CHAT, {**body, "seed": seed}).json())
        counts.add(len(one["calls"]))
        assert one["reason"] in ("tool_calls", "length") and one["content"] == ""
    assert max(counts) > 1
    cut = {
        **body,
        "max_tokens": len('<tool_call>\n{"name": "get_weather", "arguments": {"'),
        "seed": 1,
        "tools": TOOLS[:1],
    }
    [one] = as_streamed(hermes.post(CHAT, cut).json())
    assert one["reason"] == "length" and one["calls"][0]["name"] == "get_weather" and streamed(hermes, cut) == [one]


def test_auto_leaves_it_to_the_model(hermes: Server, llama: Server) -> None:
    """Random weights call nothing by themselves; a bias makes them begin to."""
    for server in (hermes, llama):
        body = {**HELLO, "tools": TOOLS[1:], "max_tokens": 20, "seed": 2}
        [one] = as_streamed(server.post(CHAT, body).json())
        assert one["content"] and not one["calls"] and streamed(server, body) == [one]
    # a strict tool: wherever a call begins it has its form
    body = {**HELLO, "tools": TOOLS, "response_format": {"type": "json_object"}, "seed": 0}
    for seed in range(4):
        [one] = as_streamed(hermes.post(CHAT, {**body, "seed": seed}).json())
        assert one["content"].startswith("{") or one["calls"]


def test_an_answer_that_looks_like_a_call_is_content(hermes: Server, llama: Server) -> None:
    """It has a name, but neither a tool's nor arguments."""
    alice = {"name": "Alice", "age": 3}
    form = {"type": "json_schema", "json_schema": {"schema": {"const": alice}}}
    for server in (hermes, llama):
        seen = set()
        for seed in range(6):
            body = {**HELLO, "tools": TOOLS[1:], "response_format": form, "seed": seed}
            [one] = found = as_streamed(server.post(CHAT, body).json())
            assert streamed(server, body) == found
            seen.add(one["reason"])
            if one["calls"]:
                assert one["content"] == "" and one["calls"] == {0: {"name": "now", "arguments": "{}"}}
            else:
                assert json.loads(one["content"]) == alice and one["reason"] == "stop"
        assert "stop" in seen


def test_a_conversation_with_tools_goes_on(hermes: Server) -> None:
    client = hermes.client()
    asked: dict[str, Any] = {**HELLO, "tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**asked, seed=1).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    messages = [*HELLO["messages"], message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(**{**asked, "messages": messages, "tool_choice": "none", "max_tokens": 5})
    assert again.choices[0].message.tool_calls is None
    counts = [
        hermes.post("/tokenize", {"messages": HELLO["messages"], **fields}).json()["count"]
        for fields in ({}, {"tools": []}, {"tools": TOOLS})
    ]
    assert counts[0] == counts[1] < counts[2]


def test_streams_of_the_official_client(hermes: Server) -> None:
    body = {**HELLO, "tools": TOOLS[:1], "tool_choice": "required", "seed": 4, "parallel_tool_calls": False}
    with hermes.client().chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls
    assert final.choices[0].finish_reason == "tool_calls" and call.function.parsed_arguments["city"] in (
        "Paris",
        "日本",
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": None}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": TOOLS + TOOLS}, "tools"),
        ({"tools": [function(name="a", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": TOOLS * 70}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS}, "tool_choice"),
        (
            {
                "tools": [function(name="a", parameters={"properties": {"x": {"type": "no"}}})],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(hermes: Server, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = hermes.post(CHAT, {**HELLO, **fields, "stream": stream})
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == param, error
        assert "\n" not in error["message"]


def test_hostile_grammars_are_400_and_nobody_else_waits(hermes: Server) -> None:
    for fields in HOSTILE:
        response = hermes.post(COMPLETION, {"model": "org/tiny", "prompt": "a", "structured_outputs": fields})
        assert response.status_code == 400, (fields, response.text[:200])
    assert hermes.post(COMPLETION, {"model": "org/tiny", "prompt": "a"}).status_code == 200


def test_a_grammar_that_fails_on_the_way_is_the_requests_own_fault(hermes: Server) -> None:
    large = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(2500)}}
    late = {
        "json": {"type": "object", "properties": {"first": {"const": 1}, "then": large}, "required": ["first", "then"]}
    }
    body = {"model": "org/tiny", "prompt": "a", "structured_outputs": late, "max_tokens": 500}
    response = hermes.post(COMPLETION, body)
    assert response.status_code == 400 and "structured_outputs cannot be kept" in response.json()["error"]["message"]


def test_a_model_without_tools_says_so(server: Server, tmp_path: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template takes no tools"):
        server.client().chat.completions.create(**HELLO | {"max_tokens": 5}, tools=TOOLS)
    assert server.post(CHAT, {**HELLO, "max_tokens": 5, "tools": TOOLS, "tool_choice": "none"}).status_code == 200
    unknown = model(tmp_path, HERMES.replace("<tool_call>", "<call>"))
    body = {**HELLO, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    with serve(unknown, vocab_size=300) as other:
        assert "gateway.tool_parser" in other.post(CHAT, body).json()["error"]["message"]
    with serve(unknown, vocab_size=300, tool_parser="hermes") as other:
        assert as_streamed(other.post(CHAT, body).json())[0]["calls"]


@pytest.mark.parametrize(
    "broken", ["{% foo %}", "{{ " + "(" * 3000, "{{ " + "9" * 5000 + " }}"], ids=lambda text: text[:9]
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_template_that_is_none_refuses_chats_only(tmp_path: Path, broken: str, alone: bool) -> None:
    """Or, where it is only the one for tools, chats with tools."""
    plain = HERMES.replace("{% if tools %}", "{% if false %}")
    named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": broken}]
    path = model(tmp_path, plain)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": broken if alone else named}))
    hello, messages = HELLO | {"max_tokens": 2}, {"messages": HELLO["messages"]}
    with serve(path, vocab_size=300) as server:
        server.service.tokenizer.prepare()
        assert server.post(COMPLETION, {"model": "org/tiny", "prompt": "a", "max_tokens": 2}).status_code == 200
        for chat, body in ((CHAT, hello), ("/tokenize", messages)):
            assert server.post(chat, body).status_code == (400 if alone else 200)
            for choice in ("auto", "required") if chat == CHAT else (None,):
                answer = server.post(chat, body | {"tools": TOOLS} | ({"tool_choice": choice} if choice else {}))
                assert answer.status_code == 400 and "chat template" in answer.json()["error"]["message"], answer.text


def test_cors(random_model: Path) -> None:
    page = {"Origin": "https://chat.example"}
    asks = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serve(random_model, api_key="k", cors_origins=("https://chat.example",)) as server:
        preflight = httpx.options(server.url + CHAT, headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        refused = server.post(CHAT, HELLO, headers=page)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://chat.example"
        foreign = httpx.options(server.url + CHAT, headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers
    with serve(random_model) as server:
        answer = server.post(CHAT, {**HELLO, "max_tokens": 2}, headers=page)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"cors_origins": ("chat.example",)}, "gateway.cors_origins holds 'chat.example'"),
        ({"cors_origins": ("https://chat.example/",)}, "without a path"),
        ({"tool_parser": "mistral"}, "must be one of hermes, llama3_json, or null"),
    ],
)
def test_options_are_judged(option: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GatewayConfig(**option)
    assert GatewayConfig(cors_origins=("*", "http://127.0.0.1:3000"), tool_parser="hermes")
