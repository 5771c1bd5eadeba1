"""What clients may send: OpenAI's requests, and how their fields become `SamplingParams`.

Every field is honoured or refused. `Sampling` is the table of honoured sampling parameters; the NEUTRAL tables hold
well-known ones that are not supported, with the values at which leaving them out changes nothing.
"""

import random
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from workers.core import SamplingParams

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 4, 256  # a growing text is compared with every beginning of every stop string
MAX_N = 128
ANYTHING = object()  # in a NEUTRAL table: a label, which by definition has no effect

_SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "priority": (0,),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "top_k": (0, -1),
    "user": (ANYTHING,),
}
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **_SAMPLING_NEUTRAL,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (ANYTHING,),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (ANYTHING,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **_SAMPLING_NEUTRAL,
    "add_special_tokens": (True,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}


class Body(BaseModel):
    """A JSON object of the API: null means absent, unknown fields are refused, and so are fields that would be ignored.

    NEUTRAL: unsupported fields of OpenAI and vLLM with the values that are accepted because they ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

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
        sentence = f"{name} is not supported by this server; leave it out"
        raise PydanticCustomError("unsupported_parameter", "{sentence}", {"sentence": sentence, "param": name})


def _unicode(text: str) -> str:
    r"""JSON can spell half a character ("\ud800"), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the string is not valid Unicode at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


def _sentence(sentence: str) -> WrapValidator:
    """Report one sentence where a union would report one error per member."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(sentence) from None

    return WrapValidator(validate)


def _stop_strings(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, str | list):
        raise ValueError("stop must be a string or a list of strings")
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_STOP_STRINGS or any(len(s) > MAX_STOP_LENGTH for s in strings if isinstance(s, str)):
        raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters")
    return strings


class Sampling(Body):
    """The sampling parameters that are honoured. A field here has the name of the field of `SamplingParams` it sets,
    which also judges its value, so that a new parameter is one line."""

    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    seed: int = Field(default_factory=lambda: random.getrandbits(63))
    stop: Annotated[tuple[Text, ...], BeforeValidator(_stop_strings, json_schema_input_type=str | list[str])] = ()
    ignore_eos: bool = SamplingParams.ignore_eos

    @field_validator("*")
    @classmethod
    def _judge(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name in Sampling.model_fields:
            SamplingParams(**{info.field_name: value})
        return value

    def params(self, max_tokens: int, nth: int) -> SamplingParams:
        """Those of the nth choice of a prompt: its seed is the request's plus n, so that choices differ."""
        fields = {name: getattr(self, name) for name in Sampling.model_fields}
        fields["seed"] = (self.seed + nth + 2**63) % 2**64 - 2**63
        return SamplingParams(max_tokens=max_tokens, **fields)


class StreamOptions(Body):
    """include_usage: token counts in a last chunk. continuous_usage_stats: counts so far in every chunk (vLLM)."""

    NEUTRAL = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generating(Sampling):
    """What both generating endpoints share."""

    model: str
    n: int = Field(1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> "Generating":
        if self.stream_options and not self.stream:
            sentence = {"sentence": "stream_options is only allowed with stream: true", "param": "stream_options"}
            raise PydanticCustomError("unsupported_parameter", "{sentence}", sentence)
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a conversation. An assistant message may be one of our own answers, with its null fields."""

    NEUTRAL = {"annotations": ([],), "audio": (), "function_call": (), "refusal": (), "tool_calls": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Text | list[TextPart],
        _sentence('content must be a string or a list of {"type": "text", "text": ...}; nothing else is supported'),
    ]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """What chat templates read."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(Generating):
    NEUTRAL = _CHAT_NEUTRAL

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens is the old name of max_completion_tokens; give one of them")
        return self


class CompletionRequest(Generating):
    NEUTRAL = _COMPLETION_NEUTRAL

    prompt: Annotated[
        Text | list[Text] | list[int] | list[list[int]],
        _sentence("prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"),
        Field(min_length=1),
    ]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TokenizeRequest(Body):
    """vLLM's: a prompt or a conversation."""

    NEUTRAL = {"add_generation_prompt": (True,), "continue_final_message": (False,), "return_token_strs": (False,)}

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
