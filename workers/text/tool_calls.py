"""Calls of tools in a model's text: how families write them, and a parser of a text that grows.

A text is read once, as it comes; whole answers and streams are made of the same events.
"""

from collections.abc import Collection
from dataclasses import dataclass

from stepladder.workers.text.call_reader import CallReader, Event


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


class ToolParser:
    """Splits a growing text into text and calls. Blanks around calls are no text. What begins like a call and turns out
    to be none is text, too, as it was written.

    Args:
        names: of the tools. Where nothing but its form tells a call from an answer in JSON, it must have one of these.
        most: calls that are told; further ones are dropped.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int | None = None) -> None:
        self._form, self._most = form, most
        self._names = None if form.begin else names
        self._rest = ""  # not read yet
        self._before = ""  # what was left out of the text before a call
        self._call: CallReader | None = None
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
            shown = rest[:at].rstrip()
            self._before, self._rest = rest[len(shown) : at + len(begin)], rest[at + len(begin) :]
            self._call = CallReader(self.calls, self._names)
            return self._text(shown)
        shown = rest if finished else rest[: len(rest) - _held(rest, begin)]
        shown = shown if finished and not self.calls else shown.rstrip()
        self._rest = "" if finished else rest[len(shown) :]
        return self._text(shown) or None

    def _at_beginning(self, finished: bool) -> list[Event] | None:
        """In a format whose calls begin the text."""
        if self._plain:
            text, self._rest = self._rest, ""
            return self._text(text)
        rest = self._rest.lstrip(" \t\r\n;}" if self.calls else " \t\r\n")
        for mark in self._form.marks:
            rest = rest.removeprefix(mark).lstrip()
            if not finished and rest and mark.startswith(rest):
                return None
        if not rest and (not finished or self.calls):
            return None
        if rest.startswith("{"):
            self._before = "" if self.calls else self._rest[: len(self._rest) - len(rest)]
            self._call, self._rest = CallReader(self.calls, self._names), rest
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
                return self._no_call(reader)
            self._ending = bool(self._form.end) or reader.failed
        return events

    def _no_call(self, reader: CallReader) -> list[Event]:
        """What began like a call is text. The character at which it went wrong may begin the next one."""
        written = self._before + reader.raw
        if self._form.begin:
            good = len(written) - reader.failed
            self._rest = written[good:] + self._rest
            return self._text(written[:good])
        self._plain, self._rest = True, written + self._rest
        return []

    def _behind_call(self, finished: bool) -> list[Event] | None:
        """Whatever a call still holds is dropped, up to its end, or to the next call if the end was forgotten."""
        marks, rest = [mark for mark in (self._form.end, self._form.begin) if mark], self._rest
        found = [(at, mark) for mark in marks if (at := rest.find(mark)) >= 0]
        if not found:
            held = 0 if finished else max((_held(rest, mark) for mark in marks), default=0)
            self._rest, self._ending = rest[len(rest) - held :], not finished
            return [] if finished else None
        at, mark = min(found)
        self._ending, self._rest = False, rest[at + len(mark) if mark == self._form.end else at :]
        return []

    @staticmethod
    def _text(text: str) -> list[Event]:
        return [Event(text)] if text else []


def _held(text: str, begin: str) -> int:
    """Length of the longest end of `text` that begins `begin`."""
    return max((n for n in range(1, len(begin)) if text.endswith(begin[:n])), default=0)
