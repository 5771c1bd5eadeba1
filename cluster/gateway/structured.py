"""The form that an answer must have, as OpenAI and vLLM spell it."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from json import JSONDecodeError
from typing import Annotated, Any

import msgspec
from pydantic import PlainValidator, model_validator

from stepladder.cluster.gateway.sampling import Sampling
from stepladder.cluster.gateway.strict_json import refusal
from stepladder.workers.nesting import read_json
from stepladder.workers.structured_outputs import StructuredOutputs

KINDS = tuple(field.name for field in dataclasses.fields(StructuredOutputs))
Form = StructuredOutputs | None
Json = dict[str, Any]
_NEUTRAL = {  # vLLM's options of structured_outputs, with the values that ask for nothing
    "disable_fallback": (True, False),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}


def _made(given: dict[str, Any]) -> StructuredOutputs:
    """A schema that is a text has not been judged with the body."""
    if isinstance(text := given.get("json"), str):
        with suppress(JSONDecodeError):  # StructuredOutputs says that better
            read_json(text, "the schema")
    try:
        return msgspec.convert(given, StructuredOutputs)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _structured_outputs(value: Any) -> StructuredOutputs:
    if not isinstance(value, dict):
        raise ValueError(f"structured_outputs must be an object with one of {', '.join(KINDS)}")
    given = {name: one for name, one in value.items() if one is not None}
    for name in [name for name in given if name not in KINDS]:
        if given.pop(name) not in _NEUTRAL.get(name, ()):
            raise ValueError(f"structured_outputs.{name} is not supported by this server; leave it out")
    return _made(given)


def _guided(kind: str) -> Callable[[Any], StructuredOutputs]:
    return lambda value: _made({kind: value})


def _response_format(value: Any) -> StructuredOutputs | None:
    match {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value:
        case {"type": "text", **rest} if not rest:
            return None
        case {"type": "json_object", **rest} if not rest:
            return StructuredOutputs(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": dict() | bool() as schema, **named}, **rest} if not rest:
            if unknown := [name for name in named if name not in ("name", "description", "strict")]:
                raise ValueError(f"response_format.json_schema takes no {unknown[0]}")
            return StructuredOutputs(json=schema)
    raise ValueError(
        'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
        '{"name": ..., "schema": ...}}'
    )


class Structured(Sampling):
    """At most one of these. guided_*: vLLM's older names. A schema always holds, with and without `strict`."""

    response_format: Annotated[Form, PlainValidator(_response_format, json_schema_input_type=Json)] = None
    structured_outputs: Annotated[Form, PlainValidator(_structured_outputs, json_schema_input_type=Json)] = None
    guided_json: Annotated[Form, PlainValidator(_guided("json"), json_schema_input_type=Json | str)] = None
    guided_regex: Annotated[Form, PlainValidator(_guided("regex"), json_schema_input_type=str)] = None
    guided_choice: Annotated[Form, PlainValidator(_guided("choice"), json_schema_input_type=list[str])] = None
    guided_grammar: Annotated[Form, PlainValidator(_guided("grammar"), json_schema_input_type=str)] = None

    @model_validator(mode="after")
    def _one_form(self) -> "Structured":
        if len(names := list(self._forms)) > 1:
            raise refusal(names[1], f"{' and '.join(names)} exclude each other; give one")
        return self

    @property
    def form(self) -> tuple[str, StructuredOutputs | None]:
        """The name of the field that asks for a form, and the form; "" and None without one."""
        return next(iter(self._forms.items()), ("", None))

    @property
    def _forms(self) -> dict[str, StructuredOutputs]:
        fields = ((name, getattr(self, name)) for name in Structured.model_fields)
        return {name: found for name, found in fields if isinstance(found, StructuredOutputs)}
