"""One call of a tool, read from a text that grows."""

import json
from collections.abc import Collection
from typing import NamedTuple


class Event(NamedTuple):
    """What is new. Either `text`, or of the call number `call`: its `name`, once, or a part of its arguments' JSON."""

    text: str = ""
    call: int = -1
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads one call's object, {"name": ..., "arguments": {...}}, character by character. Other keys are skipped.

    Args:
        names: it is a call only with one of these names and with arguments; None takes any name, and a call without
            arguments has the empty object.

    Attributes:
        raw: what has been read, until it is named.
        named: its name has been told, from where on it is a call. done: the object is complete. failed: it is none.
    """

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, index: int, names: Collection[str] | None) -> None:
        self.index, self._names, self.raw = index, names, ""
        self.named = self.done = self.failed = False
        self._place = "open"  # open, key, colon, value, behind
        self._depth, self._quoted, self._escaped = 0, False, False
        self._key, self._value = list[str](), list[str]()
        self._role = ""  # of the value: name, arguments, or "" for one that is skipped
        self._opens = ""  # its first character
        self._name: str | None = None
        self._given = False  # arguments have begun
        self._waiting: list[str] = []  # arguments that came before the name

    def read(self, text: str) -> tuple[int, list[Event]]:
        """How many characters belong to it, and what they tell."""
        events: list[Event] = []
        used = 0
        for character in text:
            if self.done or self.failed:
                break
            used += 1
            events += self._next(character)
        if (self.done or self.failed) and self.named and not self._given:
            self._given = True
            events += self._arguments("{}")
        self.raw += "" if self.named else text[:used]
        return used, _joined(events)

    def _next(self, character: str) -> list[Event]:
        if self._place == "value":
            return self._in_value(character)
        if self._place == "key" and self._quoted:
            self._in_string(character)
            self._key.append(character)
            self._place = "key" if self._quoted else "colon"
            return []
        if character.isspace():
            return []
        match self._place, character:
            case "open", "{":
                self._place = "key"
            case "key", '"':
                self._quoted, self._key = True, []
            case "colon", ":":
                return self._begin_value()
            case "behind", "," | "}":
                return self._end_value(character)
            case _:
                self.failed = True
        return []

    def _begin_value(self) -> list[Event]:
        key = "".join(self._key[:-1])
        self._place, self._value, self._opens, self._role = "value", [], "", ""
        if key == "name" and self._name is None:
            self._role = "name"
        elif key in self.ARGUMENTS and not self._given:
            self._role, self._given = "arguments", True
        return self._tell()

    def _in_value(self, character: str) -> list[Event]:
        if self._quoted:
            self._in_string(character)
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
            self._place = "value" if self._depth else "behind"
        elif character in ",}" and not self._depth:
            return self._end_value(character)
        elif character.isspace() and not self._depth:
            return []
        self._opens = self._opens or character
        if self._streams:
            return self._arguments(character)
        self._value += character if self._role else ""
        return []

    @property
    def _streams(self) -> bool:
        """Whether the value is told as it comes: arguments, unless they are JSON in a string or no object."""
        return self._role == "arguments" and self._opens == "{"

    def _end_value(self, character: str) -> list[Event]:
        self._place, self.done = "key", character == "}"
        value = "".join(self._value)
        if self._role == "name":
            self._name = _string(value)
            self.failed = self._name is None or (self._names is not None and self._name not in self._names)
            return [] if self.failed else self._tell()
        if self._role == "arguments" and not self._streams:
            value = (_string(value) or "") if self._opens == '"' else value
            return self._arguments("{}" if value.strip() in ("", "null") else value)
        return []

    def _tell(self) -> list[Event]:
        """The name and what waited for it, as soon as it is sure to be a call."""
        if self.named or self._name is None or (self._names is not None and not self._given):
            return []
        self.named = True
        return [Event(call=self.index, name=self._name), *self._arguments("".join(self._waiting))]

    def _arguments(self, part: str) -> list[Event]:
        if not self.named:
            self._waiting.append(part)
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
    """Of one call: its name, which comes first, and the parts of its arguments as one event."""
    named = [event for event in events if event.name is not None]
    part = "".join(event.arguments for event in events)
    return [*named, Event(call=events[0].call, arguments=part)] if part else named


def _string(text: str) -> str | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, str) else None
