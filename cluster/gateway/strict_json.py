"""JSON objects of the API: every field is honoured or refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from stepladder.workers.text.unicode_text import unicode

Neutral = Mapping[str, tuple[Any, ...]]
ANYTHING = object()  # in a NEUTRAL table: a label, which by definition has no effect


@dataclass(frozen=True)
class Bounds:
    """What no list of a request exceeds, so that judging one takes little time.

    Attributes:
        tokens: of one prompt; also messages of a conversation, which have a token at least.
        prompts: of one request.
    """

    tokens: int
    prompts: int


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
            if name not in cls.NEUTRAL and name not in cls.model_fields:
                break  # one unknown field is enough to refuse it, and there may be a million
        return kept


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if not any(n is ANYTHING or (n == value and isinstance(n, bool) == isinstance(value, bool)) for n in neutral):
        raise refusal(name, f"{name} is not supported by this server; leave it out")


def refusal(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "{message}", {"message": message, "param": param})


def at_most(value: Any, most: int | None, what: str) -> Any:
    """The value; ValueError if it is a list or an object with more than `most` entries, before any is looked at."""
    if most is not None and isinstance(value, list | dict) and len(value) > most:
        raise ValueError(f"{what} holds {len(value)} entries; this server takes at most {most}")
    return value


def bounded(what: str, most: Callable[[Bounds], int]) -> BeforeValidator:
    """`at_most`, where the bound depends on the context that a body is judged in (`reading.Bounds`)."""

    def judge(value: Any, info: ValidationInfo) -> Any:
        return at_most(value, most(info.context) if info.context else None, what)

    return BeforeValidator(judge)


Text = Annotated[str, AfterValidator(unicode)]
