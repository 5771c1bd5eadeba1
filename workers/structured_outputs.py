"""What a text must look like, as a request asks for it; `grammar/` makes sure that it does. Pure host data."""

import json
from dataclasses import dataclass
from typing import Any

MAX_GRAMMAR_LENGTH = 1 << 17  # characters; compiling takes time and memory in proportion
MAX_RULES = 1000  # lines of a grammar, or references in a schema: each may be one more call of a recursion


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """One of the following; the others stay as they are.

    Attributes:
        json: a JSON schema, as a dictionary or as its text; it is kept as its text.
        json_object: any JSON object.
        regex: a regular expression (Rust's syntax) that the whole text matches.
        choice: the text is one of these.
        grammar: a context-free grammar in llguidance's Lark syntax or in GBNF.

    Raises:
        ValueError: none or several are given, or one is empty, too large, or no JSON.
    """

    json: str | dict[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        given = self.given
        if len(given) != 1:
            named = ", ".join(given) or "none"
            raise ValueError(f"give exactly one of json, json_object, regex, choice and grammar; there is {named}")
        if self.json_object:
            return
        text = "\n".join(self.choice) if self.choice else self.text
        if not text:
            raise ValueError(f"{given[0]} is empty")
        if len(text) > MAX_GRAMMAR_LENGTH:
            raise ValueError(f"{given[0]} has {len(text)} characters; {MAX_GRAMMAR_LENGTH} is the most")
        if self.grammar and text.count("\n") >= MAX_RULES:
            raise ValueError(f"grammar has more than {MAX_RULES} lines")
        if text.count('"$ref"') > MAX_RULES:
            raise ValueError(f"{given[0]} has more than {MAX_RULES} references ($ref)")

    def _check_types(self) -> None:
        """None asks for nothing, as in vLLM."""
        for name in ("regex", "grammar"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name} is {value!r}; it must be a text")
        choice = () if self.choice is None else self.choice
        if not isinstance(choice, list | tuple) or not all(isinstance(one, str) for one in choice):
            raise ValueError(f"choice is {choice!r}; it must be a list of texts")
        object.__setattr__(self, "choice", tuple(choice))
        object.__setattr__(self, "json_object", False if self.json_object is None else self.json_object)
        if not isinstance(self.json_object, bool):
            raise ValueError(f"json_object is {self.json_object!r}; it must be true or false")

    @property
    def given(self) -> list[str]:
        """The names of those that are asked for."""
        return [name for name in ("json", "json_object", "regex", "choice", "grammar") if self._asks(name)]

    @property
    def text(self) -> str:
        """Of the schema, expression or grammar; "" without one."""
        assert not isinstance(self.json, dict | bool)
        return self.json or self.regex or self.grammar or ""

    def _asks(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False and value != ()


def _schema_text(schema: str | dict[str, Any] | bool) -> str:
    """Raises ValueError: it is no JSON schema."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if found is True:
            found = {}
        if not isinstance(found, dict):
            raise ValueError("json must be a schema: a JSON object, or the text of one")
        return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (RecursionError, TypeError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"json is not a JSON schema: {why}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"json is not valid JSON: {error}") from None
