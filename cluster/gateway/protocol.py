"""What clients may send: OpenAI's requests, with vLLM's extensions.

Every field is honoured or refused. `Sampling` is the table of honoured sampling parameters; the NEUTRAL tables hold
well-known ones that are not supported, with the values at which leaving them out changes nothing.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, WrapValidator, model_validator

from stepladder.cluster.gateway.sampling import Sampling
from stepladder.cluster.gateway.strict_json import ANYTHING, Body, Neutral, Text, refusal
from stepladder.workers.params import MAX_LOGPROBS

MAX_N = 128

_SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "priority": (0,),
    "spaces_between_special_tokens": (True,),
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


class Generating(Sampling):
    """What both generating endpoints share."""

    model: str
    n: int = Field(1, ge=1, le=MAX_N)
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


class Message(Body):
    """One message of a conversation. An assistant message may be one of our own answers, with its null fields."""

    NEUTRAL: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Text | list[TextPart],
        _one_error('content must be a string or a list of {"type": "text", "text": ...}; nothing else is supported'),
    ]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """What chat templates read."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(Generating):
    NEUTRAL = _CHAT_NEUTRAL

    messages: list[Message] = Field(min_length=1)
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


class CompletionRequest(Generating):
    """echo: the text begins with the prompt. With it, max_tokens may be 0: the prompt is only scored.
    add_special_tokens: a prompt of text gets those that the tokenizer puts around a text."""

    NEUTRAL = _COMPLETION_NEUTRAL

    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt: Annotated[
        Text | list[Text] | list[int] | list[list[int]],
        _one_error("prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"),
        Field(min_length=1),
    ]

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


class TokenizeRequest(Body):
    """vLLM's: a prompt or a conversation."""

    NEUTRAL: ClassVar[Neutral] = {
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "return_token_strs": (False,),
    }

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
