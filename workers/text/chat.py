"""A conversation as the prompt that a model's chat template makes of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from jinja2 import Template

Message = Mapping[str, Any]
OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")  # fields of a request

END, SPACE = "\ufdd1", "\u2003"  # a noncharacter behind the text that is continued; a space that no template writes
FIRST, SECOND, FIELD = "qzfirst", "qzsecond", "qzfield"  # what no template holds
ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation becomes a prompt.

    Attributes:
        add_generation_prompt: the prompt ends with the beginning of the answer; None: unless a message is continued.
        continue_final_message: the prompt ends with the text of the last message, which the answer goes on with.
        template_kwargs: further variables of the template.
        special_tokens_in_content: what spells a special token in a message is one; otherwise it is text.

    Raises:
        ValueError: two of them contradict each other.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_content: bool = False

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: an answer either goes on with "
                "the last message or begins a new one"
            )
        for name in self.template_kwargs:
            if name in OWN:
                raise ValueError(f"chat_template_kwargs holds {name}, which cannot be set there")

    @property
    def begins_answer(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


DEFAULTS = ChatOptions()


class _Forms(NamedTuple):
    """What a template takes as the content of a role's messages: strings, lists of parts, or both."""

    strings: bool
    parts: bool


class ChatTemplate:
    """A chat template, and what it takes: found out by rendering it.

    Args:
        special: variables of the template, such as `bos_token`.
    """

    def __init__(self, template: Template, special: Mapping[str, str]) -> None:
        self._template, self._special = template, special
        self._forms: dict[str, _Forms] = {}
        self._calls: tuple[bool, Any] | None = None

    def fitted(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The same conversation in the form that the template takes; what is null is left out."""
        return [self._fitted(message) for message in messages]

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, options: ChatOptions) -> str:
        """The prompt's text. Raises whatever a template may raise."""
        if options.continue_final_message:
            return self._continued(messages, tools, options)
        return self._render(messages, tools, options.begins_answer, options.template_kwargs)

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, begins_answer: bool, further: Mapping[str, Any]
    ) -> str:
        variables = {"documents": None, **self._special, **further}
        given = {"messages": messages, "tools": tools, "add_generation_prompt": begins_answer}
        return self._template.render(variables | given)

    def _continued(self, messages: list[dict[str, Any]], tools: list[Any] | None, options: ChatOptions) -> str:
        """Up to the end of the last message's text, which is marked to be found again."""
        if not messages:
            raise ValueError("there is no message that could be continued")
        last = dict(messages[-1])
        content, tag = last.get("content"), END + SPACE
        if isinstance(content, str):
            last["content"], text = content + tag, content
        elif isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
            text = content[-1]["text"]
            last["content"] = [*content[:-1], content[-1] | {"text": text + tag}]
        else:
            raise ValueError("the last message has no text that could be continued")
        rendered = self._render([*messages[:-1], last], tools, options.begins_answer, options.template_kwargs)
        before, found, behind = rendered.rpartition(END)
        if not found:
            raise ValueError("it leaves out the last message, which therefore cannot be continued")
        if behind.startswith(SPACE) or not text.strip():
            return before
        return before.removesuffix(text[len(text.rstrip()) :])  # it trims: so would it have trimmed this text

    def _fitted(self, message: Message) -> dict[str, Any]:
        fitted = {name: value for name, value in message.items() if value is not None}
        content = fitted.get("content")
        if isinstance(content, str) and content and not self.forms(fitted.get("role")).strings:
            fitted["content"] = [_part(content)]
        elif isinstance(content, list) and all(map(_is_text, content)) and not self.forms(fitted.get("role")).parts:
            fitted["content"] = "".join(part["text"] for part in content)
        if not fitted.get("tool_calls"):
            return fitted
        as_objects, no_content = self.calls()
        if "content" not in fitted and no_content is not ABSENT:
            fitted["content"] = no_content
        return fitted | {"tool_calls": [_call(call, as_objects) for call in fitted["tool_calls"]]}

    def forms(self, role: Any) -> _Forms:
        """What the messages of a role may hold."""
        key = str(role)
        if key not in self._forms:
            strings = self._try(_conversation(key, FIRST), (FIRST,))
            parts = [
                _part(FIRST) | {FIELD: FIELD},
                _part(SECOND) | {FIELD: FIELD},
            ]  # a list that is printed shows FIELD
            found = _Forms(strings, self._try(_conversation(key, parts), (FIRST, SECOND), (FIELD,)))
            unknown = _Forms(True, False) if key == "user" else self.forms("user")
            self._forms[key] = found if any(found) else unknown
        return self._forms[key]

    def calls(self) -> tuple[bool, Any]:
        """Whether the arguments of tool calls are given as objects, else as JSON; and what is given as the content of
        a message that has none. Without a template that shows calls, what `transformers` would give."""
        if self._calls is None:
            ways = product((True, False), (ABSENT, "", None))
            shown = (way for way in ways if self._try(_calling(*way), (FIRST, SECOND), ("none", f'\\"{SECOND}')))
            self._calls = next(shown, (True, ABSENT))
        return self._calls

    def _try(self, messages: list[Message], shown: Sequence[str], hidden: Sequence[str] = ()) -> bool:
        """Whether the template shows all of some texts, in any case, and none of others."""
        try:
            text = self._render(messages, None, False, {}).lower()
        except Exception:  # a template is a program: it may raise anything
            return False
        return all(part in text for part in shown) and not any(part in text for part in hidden)


def _conversation(role: str, content: Any) -> list[Message]:
    """A conversation in which a role's message has this content."""
    user = {"role": "user", "content": "x" if isinstance(content, str) else [_part("x")]}
    message = {"role": role, "content": content}
    if role == "user":
        return [message]
    if role in ("system", "developer"):
        return [message, user]
    if role == "tool":
        call = {"id": "call00001", "type": "function", "function": {"name": "x", "arguments": {}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [user, called, message | {"tool_call_id": "call00001", "name": "x"}]
    return [user, message]


def _calling(as_objects: bool, content: Any) -> list[Message]:
    """A conversation that ends with a tool call, and a content of that message besides."""
    arguments = {SECOND: "x"}
    function = {"name": FIRST, "arguments": arguments if as_objects else json.dumps(arguments)}
    called = {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}
    return [{"role": "user", "content": "x"}, called | ({} if content is ABSENT else {"content": content})]


def _call(call: Any, as_objects: bool) -> Any:
    """A tool call whose arguments are an object or JSON, as wanted; what is no object stays as it is."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str) and as_objects:
        arguments = _object(arguments)
    elif isinstance(arguments, Mapping) and not as_objects:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: str) -> Any:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
