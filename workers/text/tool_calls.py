"""Calls of tools in a model's text: how families write them, and a parser of a text that grows.

A text is read once, as it comes; whole answers and streams are made of the same events.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        begin: what begins a call. Without one a call is a JSON object that the text begins with.
        end: what ends it.
        marks: what may stand before the first call and is no text.
        arguments: the name of the arguments in a call's object, as the models were trained.
        between: what stands between two calls; None: there is one call at most in an answer.
        template: what chat templates of these models hold; unless they hold something of `not_template`.
    """

    begin: str
    end: str
    arguments: str
    between: str | None
    template: tuple[str, ...]
    not_template: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def special(self) -> tuple[str, ...]:
        """What may be special tokens of a tokenizer, and must be seen nevertheless."""
        return tuple(mark for mark in (self.begin, self.end, *self.marks) if mark)


FORMATS = {  # the names are vLLM's
    "hermes": ToolFormat(
        "<tool_call>", "</tool_call>", "arguments", "\n", ("<tool_call>",), ("<function=", "<arg_key>")
    ),
    "llama3_json": ToolFormat(
        "", "", "parameters", None, ("<|python_tag|>", "Respond in the format {"), marks=("<|python_tag|>",)
    ),
}


def detect(template: str) -> str | None:
    """The name of the format that a chat template shows; None if it shows none of these."""
    fitting = (
        name
        for name, form in FORMATS.items()
        if any(part in template for part in form.template) and not any(part in template for part in form.not_template)
    )
    return next(fitting, None)


class Event(NamedTuple):
    """What is new. Either `text`, or of the call number `call`: its `name`, once, or a part of its arguments' JSON."""

    text: str = ""
    call: int = -1
    name: str | None = None
    arguments: str = ""


class ToolParser:
    """Splits a growing text into text and calls. Blanks around calls are no text. What begins like a call and turns out
    to be none is text, too, as it was written.

    Args:
        most: calls that are told; further ones are dropped.
    """

    def __init__(self, form: ToolFormat, most: int | None = None) -> None:
        self._form, self._most = form, most
        self._rest = ""  # not read yet
        self._call: _CallReader | None = None
        self._ending = False  # behind a call's object, before its end
        self._plain = False  # a format without `begin`: there was text, so that there are no calls any more
        self.calls = 0

    def push(self, text: str, finished: bool = False) -> list[Event]:
        """The events of some more text. `finished` releases what was held back."""
        self._rest += text
        events: list[Event] = []
        while (found := self._step(finished)) is not None:
            events += [event for event in found if self._most is None or event.call < self._most]
        return events

    def _step(self, finished: bool) -> list[Event] | None:
        """What can be told next; None if nothing can."""
        if self._call is not None:
            return self._in_call(finished)
        if self._ending:
            return self._behind_call(finished)
        if not self._rest:
            return None
        return self._in_text(finished) if self._form.begin else self._at_beginning(finished)

    def _in_text(self, finished: bool) -> list[Event] | None:
        begin, rest = self._form.begin, self._rest
        if (at := rest.find(begin)) >= 0:
            self._call, self._rest = _CallReader(self.calls), rest[at + len(begin) :]
            return self._text(rest[:at].rstrip())
        shown = rest if finished else rest[: len(rest) - _held(rest, begin)]
        shown = shown if finished and not self.calls else shown.rstrip()
        self._rest = "" if finished else rest[len(shown) :]
        return self._text(shown) or None

    def _at_beginning(self, finished: bool) -> list[Event] | None:
        """In a format whose calls begin the text."""
        if self._plain:
            text, self._rest = self._rest, ""
            return self._text(text)
        rest = self._rest.lstrip(" \t\r\n;" if self.calls else " \t\r\n")
        for mark in self._form.marks:
            rest = rest.removeprefix(mark).lstrip()
            if not finished and rest and mark.startswith(rest):
                return None
        if not rest and (not finished or self.calls):
            return None
        if rest.startswith("{"):
            self._call, self._rest = _CallReader(self.calls), rest
            return []
        self._plain = True
        if self.calls:
            self._rest = rest
        return []

    def _in_call(self, finished: bool) -> list[Event] | None:
        assert self._call is not None
        if not self._rest and not finished:
            return None
        reader = self._call
        used, events = reader.read(self._rest)
        self._rest = self._rest[used:]
        if reader.named:
            self.calls = reader.index + 1
        if reader.failed or reader.done or finished:
            self._call = None
            if not reader.named:
                return self._no_call(reader.raw)
            self._ending = bool(self._form.end)
        return events

    def _no_call(self, written: str) -> list[Event]:
        """What began like a call is text."""
        if self._form.begin:
            return self._text(self._form.begin + written)
        self._plain, self._rest = True, written + self._rest
        return []

    def _behind_call(self, finished: bool) -> list[Event] | None:
        rest, end = self._rest.lstrip(), self._form.end
        if not finished and end.startswith(rest) and end != rest:
            return None
        self._ending, self._rest = False, rest.removeprefix(end) if rest.startswith(end) else self._rest
        return []

    @staticmethod
    def _text(text: str) -> list[Event]:
        return [Event(text)] if text else []


class _CallReader:
    """Reads one call's object, {"name": ..., "arguments": {...}}, character by character.

    Attributes:
        raw: what has been read.
        named: its name has been told, from where on it is a call. done: the object is complete. failed: it is none.
    """

    ARGUMENTS = ("arguments", "parameters")
    KEYS = ("name", *ARGUMENTS, "type", "id", "function")

    def __init__(self, index: int) -> None:
        self.index, self.raw = index, ""
        self.named = self.done = self.failed = False
        self._place = "open"  # open, key, colon, value, behind
        self._depth, self._quoted, self._escaped = 0, False, False
        self._key = self._value = ""
        self._waiting = ""  # arguments that came before the name

    def read(self, text: str) -> tuple[int, list[Event]]:
        """How many characters belong to it, and what they tell."""
        events: list[Event] = []
        for used, character in enumerate(text):
            if self.done or self.failed:
                return used, _joined(events)
            self.raw += character
            events += self._next(character)
        return len(text), _joined(events)

    def _next(self, character: str) -> list[Event]:
        if self._place == "value":
            return self._in_value(character)
        if self._place == "key" and self._quoted:
            self._in_string(character)
            self._key += character
            if not self._quoted:
                self._place, self._key = "colon", self._key[:-1]
                self.failed = self._key not in self.KEYS
            return []
        if character.isspace():
            return []
        match self._place, character:
            case "open", "{":
                self._place = "key"
            case "key", '"':
                self._quoted, self._key = True, ""
            case "colon", ":":
                self._place, self._value, self._depth = "value", "", 0
            case _:
                self.failed = True
        return []

    def _in_value(self, character: str) -> list[Event]:
        if self._quoted:
            self._in_string(character)
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
        elif character in ",}" and not self._depth:
            self._place, self.done = "key", character == "}"
            return self._end_value()
        elif character.isspace() and not self._depth:
            return []
        self._value += character
        return self._arguments(character) if self._streams else []

    @property
    def _streams(self) -> bool:
        """Whether the value is told as it comes: arguments, unless they are JSON in a string."""
        return self._key in self.ARGUMENTS and not self._value.startswith('"')

    def _end_value(self) -> list[Event]:
        if self._key == "name":
            name = _string(self._value)
            self.failed = name is None or self.named
            if self.failed or name is None:
                return []
            self.named = True
            waiting, self._waiting = self._waiting, ""
            return [Event(call=self.index, name=name), *self._arguments(waiting)]
        if self._key in self.ARGUMENTS and not self._streams:
            return self._arguments(_string(self._value) or "")
        return []

    def _arguments(self, part: str) -> list[Event]:
        if not self.named:
            self._waiting += part
            return []
        return [Event(call=self.index, arguments=part)] if part else []

    def _in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = False


def _joined(events: list[Event]) -> list[Event]:
    """Parts of one call's arguments as one event."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if last and event.name is None and last.name is None:
            joined[-1] = last._replace(arguments=last.arguments + event.arguments)
        else:
            joined.append(event)
    return joined


def _string(text: str) -> str | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _held(text: str, begin: str) -> int:
    """Length of the longest end of `text` that begins `begin`."""
    return max((n for n in range(1, len(begin)) if text.endswith(begin[:n])), default=0)
