"""The sampling parameters of a request, and how they become the engine's."""

import random
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, ValidationInfo, field_validator

from stepladder.cluster.gateway.strict_json import Body, Text, at_most
from stepladder.workers.params import MAX_COUNT, MAX_LISTED_TOKENS, SamplingParams

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 256
MAX_STOP_CHARACTERS = 4096  # of all together: a growing text is compared with every beginning of every stop string


def _stop_strings(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, str | list):
        raise ValueError("stop must be a string or a list of strings")
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_STOP_STRINGS or any(len(s) > MAX_STOP_LENGTH for s in strings if isinstance(s, str)):
        raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters")
    if sum(len(s) for s in strings if isinstance(s, str)) > MAX_STOP_CHARACTERS:
        raise ValueError(f"stop takes at most {MAX_STOP_CHARACTERS} characters in all its strings together")
    return strings


def _token_biases(value: Any) -> Any:
    """JSON's names are strings."""
    at_most(value, MAX_LISTED_TOKENS, "logit_bias")
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, ValueError):
        raise ValueError("logit_bias must be an object that maps token ids to numbers") from None


def _token_list(value: Any) -> Any:
    return at_most(value, MAX_LISTED_TOKENS, "stop_token_ids")


class Sampling(Body):
    """The sampling parameters that are honoured. A field here has the name of the field of `SamplingParams` it sets,
    which also judges its value, so that a new parameter is one line."""

    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    top_k: int = SamplingParams.top_k
    min_p: float = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    presence_penalty: float = SamplingParams.presence_penalty
    frequency_penalty: float = SamplingParams.frequency_penalty
    logit_bias: Annotated[dict[int, float], BeforeValidator(_token_biases)] = Field(default_factory=dict)
    seed: int = Field(default_factory=lambda: random.getrandbits(63))
    stop: Annotated[tuple[Text, ...], BeforeValidator(_stop_strings, json_schema_input_type=str | list[str])] = ()
    stop_token_ids: Annotated[tuple[int, ...], Strict(False), BeforeValidator(_token_list)] = ()
    include_stop_str_in_output: bool = SamplingParams.include_stop_str_in_output
    min_tokens: int = SamplingParams.min_tokens
    ignore_eos: bool = SamplingParams.ignore_eos
    skip_special_tokens: bool = SamplingParams.skip_special_tokens
    speculate: bool = SamplingParams.speculate
    prompt_logprobs: int | None = None

    @field_validator("*")
    @classmethod
    def _judge(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name in Sampling.model_fields:
            fields = {"max_tokens": MAX_COUNT, info.field_name: value}
            SamplingParams(**fields)
        return value

    def params(self, defaults: SamplingParams, **fields: Any) -> SamplingParams:
        """Those of a prompt's first choice; further ones have higher seeds, so that choices differ.

        Args:
            defaults: what holds for fields that the request leaves out, the seed excepted.
            fields: what the request says in its own way: max_tokens, logprobs, prompt_logprobs, structured_outputs.

        Raises:
            ValueError: two of them contradict each other.
        """
        given: dict[str, Any] = {n: getattr(self, n) for n in self.model_fields_set if n in Sampling.model_fields}
        return replace(defaults, **{**given, "seed": self.seed, **fields})
