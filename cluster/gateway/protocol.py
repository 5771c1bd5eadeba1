"""What clients may send: OpenAI's requests, with vLLM's extensions.

Every field is honoured or refused. `Sampling` is the table of honoured sampling parameters; the NEUTRAL tables hold
well-known ones that are not supported, with the values at which leaving them out changes nothing.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from stepladder.cluster.gateway.metadata import Labels, labels
from stepladder.cluster.gateway.strict_json import (
    ANYTHING,
    Body,
    Bounds,
    Neutral,
    Text,
    at_most,
    bounded,
    refusal,
)
from stepladder.cluster.gateway.structured import Structured
from stepladder.cluster.gateway.tools import Tooled, ToolUse
from stepladder.workers.params import MAX_LOGPROBS
from stepladder.workers.text.chat import ChatOptions
from stepladder.workers.text.unicode_text import unicode

MAX_N = 128

_SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "priority": (0,),
    "spaces_between_special_tokens": (True,),
    "user": (ANYTHING,),
}
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **_SAMPLING_NEUTRAL,
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (ANYTHING,),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (ANYTHING,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **_SAMPLING_NEUTRAL,
    "suffix": ("",),
}


def _one_error(text: str) -> WrapValidator:
    """Report one error where a union would report one per member."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(text) from None

    return WrapValidator(validate)


class StreamOptions(Body):
    """include_usage: token counts in a last chunk. continuous_usage_stats: counts so far in every chunk (vLLM)."""

    NEUTRAL: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generating(Structured):
    """What both generating endpoints share. timeout: seconds after which nobody waits for the answer any longer.
    metadata: OpenAI's; `Labels` says what they mean here."""

    model: str
    n: int = Field(1, ge=1, le=MAX_N)
    timeout: float | None = Field(None, gt=0, le=86400)
    metadata: Annotated[Labels, PlainValidator(labels, json_schema_input_type=dict[str, str | bool])] = Field(
        default_factory=Labels
    )
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _fits_stream(self) -> "Generating":
        if self.stream_options and not self.stream:
            raise refusal("stream_options", "stream_options is only allowed with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise refusal("prompt_logprobs", "prompt_logprobs are not sent in a stream; leave out stream")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    """arguments: JSON, as a model writes them, or the object itself."""

    name: Text
    arguments: Text | dict[str, Any] = ""


class ToolCall(Body):
    NEUTRAL: ClassVar[Neutral] = {"index": (ANYTHING,)}  # of a stream's deltas

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation. An assistant message may be one of our own answers, with its null fields."""

    NEUTRAL: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    name: Text | None = None
    tool_calls: Annotated[
        list[ToolCall] | None, Field(fail_fast=True), bounded("tool_calls", lambda bounds: bounds.tokens)
    ] = None
    tool_call_id: Text | None = None
    content: Annotated[
        Text | Annotated[list[TextPart], Field(fail_fast=True)] | None,
        bounded("content", lambda bounds: bounds.tokens),
        _one_error('content must be a string or a list of {"type": "text", "text": ...}; nothing else is supported'),
        Field(validate_default=True),
    ] = None

    @field_validator("tool_calls", "tool_call_id")
    @classmethod
    def _has_its_role(cls, value: Any, info: ValidationInfo) -> Any:
        role = {"tool_calls": "assistant", "tool_call_id": "tool"}[info.field_name or ""]
        if value and info.data.get("role", role) != role:
            raise ValueError(f"only a message with the role {role} can have {info.field_name}")
        return value

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("a message needs content, unless it is the assistant's and has tool_calls")
        return value

    @property
    def length(self) -> int:
        """Characters that it holds, more or less."""
        parts = [part.text for part in self.content] if isinstance(self.content, list) else [self.content or ""]
        return sum(map(len, (*parts, self.name or "", self.tool_call_id or "", str(self.tool_calls or ""))))

    def for_template(self) -> dict[str, Any]:
        """What chat templates read."""
        return self.model_dump(exclude_none=True, exclude=None if self.tool_calls else {"tool_calls"})


class Conversing(Body):
    """How a conversation becomes a prompt: vLLM's fields, and whether what spells a special token in a message is one.

    add_special_tokens: the prompt gets those that the tokenizer puts around a text; templates write them themselves.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    special_tokens_in_content: bool | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_fields_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        return dict(ChatOptions(template_kwargs=value).template_kwargs)

    @model_validator(mode="after")
    def _fit_together(self) -> "Conversing":
        try:
            self.chat_options(False)
        except ValueError as error:
            raise refusal("continue_final_message", str(error)) from None
        return self

    def chat_options(self, special_tokens_in_content: bool) -> ChatOptions:
        """Args: special_tokens_in_content: what holds where the request does not say."""
        own = self.special_tokens_in_content
        return ChatOptions(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs,
            special_tokens_in_content=special_tokens_in_content if own is None else own,
        )


Messages = Annotated[
    list[Message], Field(fail_fast=True), Field(min_length=1), bounded("messages", lambda bounds: bounds.tokens)
]


class ChatRequest(Conversing, ToolUse, Generating):
    NEUTRAL = _CHAT_NEUTRAL

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens is the old name of max_completion_tokens; give one of them")
        return self

    @property
    def reports(self) -> dict[str, int | None]:
        """What the engine is to report about tokens."""
        return {"logprobs": self.top_logprobs if self.logprobs else None, "prompt_logprobs": self.prompt_logprobs}


Prompt = str | list[str] | list[int] | list[list[int]]


def _prompt(value: Any, info: ValidationInfo) -> Prompt:
    """By hand, since a union would judge a list once for each of its members."""
    bounds = info.context
    match value:
        case "" | []:
            raise ValueError("prompt is empty; it must come to at least one token")
        case str():
            return unicode(value)
        case [int(), *_]:
            return _token_ids(value, bounds)
        case [str(), *_] | [list(), *_]:
            at_most(value, bounds.prompts if bounds else None, "prompt")
            kinds = {type(one) for one in value}
            if kinds == {str}:
                return [unicode(one) for one in value]
            if kinds == {list}:
                return [_token_ids(one, bounds) for one in value]
    raise ValueError(_PROMPT_KINDS)


def _token_ids(value: list[Any], bounds: Bounds | None) -> list[int]:
    at_most(value, bounds.tokens if bounds else None, "a prompt")
    if any(type(token) is not int for token in value):
        raise ValueError(_PROMPT_KINDS)
    return value


_PROMPT_KINDS = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"


class CompletionRequest(Generating):
    """echo: the text begins with the prompt. With it, max_tokens may be 0: the prompt is only scored.
    add_special_tokens: a prompt of text gets those that the tokenizer puts around a text."""

    NEUTRAL = _COMPLETION_NEUTRAL

    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt: Annotated[Prompt, PlainValidator(_prompt, json_schema_input_type=Prompt)]

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "max_tokens is 0, which is only allowed with echo: true")
        return self

    @property
    def reports(self) -> dict[str, int | None]:
        """What the engine is to report about tokens; echoed ones are reported like the others."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return {"logprobs": self.logprobs, "prompt_logprobs": max((n for n in wanted if n is not None), default=None)}

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt: text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value,list-item]


class TokenizeRequest(Conversing, Tooled):
    """vLLM's: a prompt or a conversation."""

    NEUTRAL: ClassVar[Neutral] = {
        "return_token_strs": (False,),
    }

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int] = Field(fail_fast=True)
