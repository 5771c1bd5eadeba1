"""Tools that a model may call: what a request says of them, and what follows for prompt, grammar and parser."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from llguidance import StructTag
from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from stepladder.cluster.gateway.errors import BadRequest
from stepladder.cluster.gateway.strict_json import Body, Text
from stepladder.workers.grammar.compiler import JSON_OPTIONS
from stepladder.workers.structured_outputs import StructuredOutputs
from stepladder.workers.text.tokenizer import Tokenizer
from stepladder.workers.text.tool_calls import FORMATS, ToolFormat, ToolParser, detect

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


class Function(Body):
    """strict: its calls keep to `parameters` even where nothing forces the model to call a tool."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"the name {value[:140]!r} must be 1 to 128 letters, digits or any of _.:/-")
        return value

    @field_validator("parameters")
    @classmethod
    def _is_object(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type", "object") != "object":
            raise ValueError("parameters must be a schema of an object")
        return value

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """Without parameters there are no arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(Body):
    type: Literal["function"]
    function: Function


class Tooled(Body):
    """What a conversation says of tools to the model."""

    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)

    @field_validator("tools")
    @classmethod
    def _has_names(cls, value: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tools have the name {twice!r}")
        return value

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """For the chat template."""
        hidden = {"function": {"strict"}}
        return [tool.model_dump(exclude_none=True, exclude=hidden) for tool in self.tools] or None


def _choice(value: Any, info: ValidationInfo) -> str:
    """ "none", "auto", "required", or "=" and the name of the only tool that may be called."""
    names = [tool.function.name for tool in info.data.get("tools", ())]
    match value:
        case "none" | "auto":
            return value
        case "required" if names:
            return value
        case {"type": "function", "function": {"name": str() as name}} if name in names:
            return f"={name}"
        case "required" | {"type": "function", "function": {"name": str()}}:
            raise ValueError("tool_choice names a tool that is not in tools" if names else "tool_choice needs tools")
    raise ValueError(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


class ToolUse(Tooled):
    tool_choice: Annotated[str, PlainValidator(_choice, json_schema_input_type=str | dict[str, Any])] = "auto"
    parallel_tool_calls: bool = True

    UNUSED: ClassVar[str] = "none"

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != self.UNUSED

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """None if the model is not to call any."""
        return super().shown_tools if self.uses_tools else None


@dataclass(frozen=True)
class ToolPlan:
    """How one answer may call tools.

    Attributes:
        structure: the form of the whole text; None if it is free.
        special: its marks are special tokens, which the text has to show.
        names: of the tools that it may call.
    """

    form: ToolFormat
    names: frozenset[str]
    structure: StructuredOutputs | None
    special: bool
    most: int | None

    def parser(self) -> ToolParser:
        return ToolParser(self.form, self.names, self.most)


def plan(
    body: ToolUse, content: StructuredOutputs | None, tokenizer: Tokenizer, configured: str | None
) -> ToolPlan | None:
    """None if no tool may be called.

    Args:
        content: the form of an answer without calls. configured: the name of the format of calls, if it is set.

    Raises:
        BadRequest: this model takes no tools, or their schemas are too large.
    """
    if not body.uses_tools:
        return None
    if not tokenizer.takes_tools:
        raise BadRequest("this model's chat template takes no tools; leave them out", param="tools")
    name = configured or detect(tokenizer.template)
    if name is None:
        sentence = "how this model writes calls of tools is not known; set gateway.tool_parser to one of"
        raise BadRequest(f"{sentence} {', '.join(FORMATS)}", param="tools")
    form, special = FORMATS[name], tokenizer.special_texts
    try:
        structure = _structure(body, form, content, lambda mark: mark in special)
    except ValueError as error:
        raise BadRequest(f"tools: {error}", param="tools", code="invalid_value") from None
    names, most = frozenset(tool.function.name for tool in body.tools), None if body.parallel_tool_calls else 1
    return ToolPlan(form, names, structure, any(mark in special for mark in form.special), most)


def _structure(
    body: ToolUse, form: ToolFormat, content: StructuredOutputs | None, is_special: Callable[[str], bool]
) -> StructuredOutputs | None:
    functions = [tool.function for tool in body.tools]
    forced = body.tool_choice != "auto"
    if body.tool_choice.startswith("="):
        functions = [one for one in functions if one.name == body.tool_choice[1:]]
    if not forced and content is None and not any(one.strict for one in functions):
        return None
    if not forced and content is None and form.begin:
        return StructuredOutputs(grammar=_within_text(form, functions, is_special))
    several = body.parallel_tool_calls and form.between is not None and not body.tool_choice.startswith("=")
    calls = f"call ({_text(form.between or '')} call)*" if several else "call"
    rules = [f"start: {calls}" if forced else f"start: {calls} | content"]
    rules += [f"call: {_marks(form, is_special)}", *(_rule(n, one, form) for n, one in enumerate(functions))]
    rules += ["body: " + " | ".join(f"f{n}" for n in range(len(functions)))]
    if not forced:
        rules += _content(content)
    return StructuredOutputs(grammar="\n".join(rules))


def _marks(form: ToolFormat, is_special: Callable[[str], bool]) -> str:
    """A call with what is around its object."""
    if not form.begin:
        return "body"
    begin, end = (mark if is_special(mark) else _text(mark) for mark in (form.begin, form.end))
    return f'{begin} "\\n" body "\\n" {end}'


def _rule(number: int, function: Function, form: ToolFormat) -> str:
    return f"f{number}: {_text(_head(function, form))} %json {_schema(function)} {_text('}')}"


def _content(content: StructuredOutputs | None) -> list[str]:
    if content is None:
        return ["content: TEXT", r"TEXT: /[^{](.|\n)*/"]
    return [f"content: %json {_with_options(json.loads(content.text) if content.json else {'type': 'object'})}"]


def _within_text(form: ToolFormat, functions: list[Function], is_special: Callable[[str], bool]) -> str:
    """Free text, in which every call has its form. A function that is not strict takes any object."""
    tags = [
        StructTag(
            trigger=form.begin,
            begin=f"{form.begin}\n{_head(one, form)}",
            grammar=_schema(one) if one.strict else '{"type": "object"}',
            end="}\n" + form.end,
        )
        for one in functions
    ]
    return StructTag.to_grammar(tags, assume_special=is_special(form.begin))


def _head(function: Function, form: ToolFormat) -> str:
    return f'{{"name": {json.dumps(function.name)}, "{form.arguments}": '


def _schema(function: Function) -> str:
    return _with_options(function.schema_of_arguments)


def _with_options(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
