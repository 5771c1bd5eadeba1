"""Chat templates: Jinja in a sandbox, with what `transformers` offers them."""

import json
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what a model is trained to write. A scope of its own, as there."""

    tags = {"generation"}  # noqa: RUF012 as its base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def compile_template(source: str) -> Template:
    """Raises jinja2.TemplateSyntaxError, and what Python raises of a program that it cannot take."""
    return _environment().from_string(source)


def literals(source: str) -> list[str]:
    """The texts that a template itself may write: those between its tags, and the strings in them; none of what is no
    template."""
    tree = _parsed(source)
    constants = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return [*(node.data for node in tree.find_all(nodes.TemplateData)), *constants]


def reads(source: str, name: str) -> bool:
    """Whether a template looks at a variable; what is no template looks at nothing."""
    return any(node.name == name for node in _parsed(source).find_all(nodes.Name))


def _parsed(source: str) -> nodes.Template:
    """Empty if it is no template: whoever renders it is told why."""
    try:
        return _environment().parse(source)
    except Exception:  # beside TemplateSyntaxError: parentheses too deep for Python, integers too long for it
        return nodes.Template([])


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda format: datetime.now().strftime(format)}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
