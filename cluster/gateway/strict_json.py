"""JSON objects of the API: every field is honoured or refused."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Neutral = Mapping[str, tuple[Any, ...]]
ANYTHING = object()  # in a NEUTRAL table: a label, which by definition has no effect


class Body(BaseModel):
    """A JSON object of the API: null means absent, unknown fields are refused, and so are fields that would be ignored.

    NEUTRAL: unsupported fields of OpenAI and vLLM with the values that are accepted because they ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    NEUTRAL: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("this must be a JSON object, sent with Content-Type: application/json")
        kept = {}
        for name, value in data.items():
            if name in cls.NEUTRAL and value is not None:
                _check_neutral(name, value, cls.NEUTRAL[name])
            elif name not in cls.NEUTRAL and (value is not None or name not in cls.model_fields):
                kept[name] = value
        return kept


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if not any(n is ANYTHING or (n == value and isinstance(n, bool) == isinstance(value, bool)) for n in neutral):
        raise refusal(name, f"{name} is not supported by this server; leave it out")


def refusal(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "{message}", {"message": message, "param": param})


def _unicode(text: str) -> str:
    r"""JSON can spell half a character ("\ud800"), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the string is not valid Unicode at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
