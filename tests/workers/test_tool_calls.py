"""The parser of tool calls: the same events whole, character by character and in any pieces."""

import json
import random
from pathlib import Path

import pytest

from stepladder.workers.text.tool_calls import FORMATS, ToolParser, detect

HERMES, LLAMA = FORMATS["hermes"], FORMATS["llama3_json"]
NAMES = ("f", "g")
NESTED = {"city": 'Par"is } {', "deep": [{"a": [1, 2.5, None]}, "</tool_call"], "é": "\\"}


def call(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


CASES = [
    (HERMES, "just text, <tool and\n", "just text, <tool and\n", []),
    (HERMES, f"<tool_call>\n{call('f', NESTED)}\n</tool_call>", "", [("f", NESTED)]),
    (
        HERMES,
        f"Let me see.\n\n<tool_call>\n{call('f', {})}\n</tool_call>\n<tool_call>\n{call('g', NESTED)}\n</tool_call>\n",
        "Let me see.",
        [("f", {}), ("g", NESTED)],
    ),
    (HERMES, f"a <tool_call>{call('f', {'x': 1})}</tool_call> b ", "a b", [("f", {"x": 1})]),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", {"x": 1})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
    (HERMES, "<tool_call>{'name': 'f'}</tool_call>", "<tool_call>{'name': 'f'}</tool_call>", []),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"arguments": null, "name": "f"}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f", oh}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}, "extra": 2}\n</tool_call>', "", [("f", {"a": 1})]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "x": "</tool_call>"}</tool_call> b',
        "b",
        [("f", {"a": 1})],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', "", [("f", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1} and}\n</tool_call> b', "b", [("f", {"a": 1})]),
    (HERMES, '<tool_call>{"thought": {"x": ["}"]}, "name": "f", "arguments": {}}</tool_call>', "", [("f", {})]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}}</tool_call>',
        "",
        [("f", {"a": 1})],
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g"}</tool_call>',
        "",
        [("f", {}), ("g", {})],
    ),
    (HERMES, 'Use <tool_call> tags like {"x"}', 'Use <tool_call> tags like {"x"}', []),
    (HERMES, 'Use \n <tool_call>{"x": 1} </tool_call>\n', 'Use \n <tool_call>{"x": 1} </tool_call>\n', []),
    (HERMES, 'In <tool_call><tool_call>{"name": "f"}</tool_call>', "In <tool_call>", [("f", {})]),
    (HERMES, '<tool_call>{"na', '<tool_call>{"na', []),
    (LLAMA, "just text", "just text", []),
    (LLAMA, call("f", NESTED, "parameters"), "", [("f", NESTED)]),
    (LLAMA, "<|python_tag|>" + call("f", NESTED, "parameters"), "", [("f", NESTED)]),
    (
        LLAMA,
        '\n{"type": "function", "name": "f", "parameters": {}}; ' + call("g", {"a": "b"}),
        "",
        [("f", {}), ("g", {"a": "b"})],
    ),
    (LLAMA, '{"name": "Alice", "age": 3}', '{"name": "Alice", "age": 3}', []),
    (LLAMA, '{"name": "Alice", "parameters": {"a": 1}}', '{"name": "Alice", "parameters": {"a": 1}}', []),
    (LLAMA, '{"parameters": {"a": 1}, "name": "Alice"} so', '{"parameters": {"a": 1}, "name": "Alice"} so', []),
    (LLAMA, '{"name": "f", "age": 3} is it', '{"name": "f", "age": 3} is it', []),
    (LLAMA, '{"name": "f"}', '{"name": "f"}', []),
    (LLAMA, ' <|python_tag|> {"name": "f"}', ' <|python_tag|> {"name": "f"}', []),
    (LLAMA, '{"parameters": {"a": 1}, "name": "f"}', "", [("f", {"a": 1})]),
    (LLAMA, '{"thought": "x", "name": "f", "parameters": {"a": 1}, "x": [1]}', "", [("f", {"a": 1})]),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}}', "", [("f", {"a": 1})]),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}, oh}', "", [("f", {"a": 1})]),
    (LLAMA, '{"temperature": 20}', '{"temperature": 20}', []),
    (LLAMA, 'text {"name": "f", "parameters": {}}', 'text {"name": "f", "parameters": {}}', []),
    (LLAMA, "", "", []),
]


def read(parser: ToolParser, pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    text, names, arguments = "", dict[int, str](), dict[int, str]()
    for index, piece in enumerate(pieces):
        for event in parser.push(piece, finished=index == len(pieces) - 1):
            text += event.text
            if event.name is not None:
                assert event.call == len(names), "once, and in order"
                names[event.call] = event.name
            if event.arguments:
                assert event.call in names, "the name comes first"
                arguments[event.call] = arguments.get(event.call, "") + event.arguments
    found = [(name, json.loads(arguments[index])) for index, name in names.items()]
    assert parser.calls == len(found)
    return text, found


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_text_and_calls(form, text, content, calls) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(1)
    cuts = [sorted(draw.choices(range(len(text) + 1), k=draw.randrange(5))) for _ in range(60)]
    for where in ([], [*range(1, len(text))], *cuts):
        pieces = [text[a:b] for a, b in zip([0, *where], [*where, len(text)], strict=True)]
        found = read(ToolParser(form, NAMES), pieces)
        assert (" ".join(found[0].split()) if calls else found[0], found[1]) == (content, calls), pieces


def test_arguments_are_told_as_they_come() -> None:
    parser, seen = ToolParser(HERMES, NAMES), []
    for character in f"<tool_call>{call('f', {'x': 'long'})}":
        seen += parser.push(character)
    assert seen[0].name == "f" and len(seen) > 8
    assert "".join(event.arguments for event in seen) == '{"x": "long"}'
    cut = ToolParser(HERMES, NAMES)
    events = cut.push('<tool_call>{"name": "f", "arguments": {"x": "lo', finished=True)
    assert events[0].name == "f" and events[-1].arguments == '{"x": "lo', "as far as it came"


def test_no_more_calls_than_are_wanted() -> None:
    text = f"<tool_call>{call('f', {})}</tool_call><tool_call>{call('g', {})}</tool_call>"
    assert {event.call for event in ToolParser(HERMES, NAMES, most=1).push(text, finished=True)} == {0}


def test_the_format_is_seen_in_the_template() -> None:
    qwen = "{%- if tools %}...return a json object within <tool_call></tool_call> XML tags{%- endif %}"
    llama = '{% if tools %}Respond in the format {"name": function name, "parameters": ...}{% endif %}'
    assert detect(qwen) == "hermes" and detect(llama) == "llama3_json"
    assert detect("{% if tools %}<tool_call>\n<function=example>{% endif %}") is None, "Qwen3-Coder's own"
    assert detect((Path(__file__).parents[2] / "launch/demo_model/tokenizer_config.json").read_text()) is None
