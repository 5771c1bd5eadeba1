"""What one gateway serves, and within which limits."""

from dataclasses import dataclass, field
from time import time

from stepladder.cluster.gateway.reading import body_bytes
from stepladder.cluster.gateway.strict_json import Bounds
from stepladder.workers.core import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What one server serves.

    Attributes:
        model_name: what clients call the model.
        max_model_len: prompt and output together, in tokens; the engines may have room for less.
        vocab_size: token ids from 0 to this are the model's.
        version: of Stepladder.
        root: where the model lies, as vLLM's clients want to know.
        api_key: bearer token that requests need, not empty. api_key_file: of more of them (`ApiKeys`). Without either,
            everybody may come in.
        max_choices: prompts times n of one HTTP request.
        max_body_bytes: of one HTTP request; None takes what the context may need.
        max_reported: log-probabilities of one answer: tokens that are reported, of prompts and choices, times the
            likeliest tokens beside each.
        request_seconds: how long a request may take, queue included; None leaves it to clients (`timeout`).
        created: when the model came to be, in Unix seconds.
        tokenizer_info: serve /tokenizer_info.
        defaults: what holds for the sampling parameters that a request leaves out, its seed and max_tokens excepted.
            The only place for such defaults, as of a generation_config.json.
        tool_parser: how the model writes calls of tools, a key of `tool_calls.FORMATS`; None looks at its template.
        cors_origins: of web pages that may ask this server.
        special_tokens_in_content: what spells a special token in a chat message is one, where a request does not say.
        chat_max_tokens: as many tokens may follow a chat that leaves max_tokens out, if the context has room for them;
            None fills the context.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    version: str
    root: str | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_file: str | None = None
    max_choices: int = 128
    max_body_bytes: int | None = None
    max_reported: int = 1 << 17
    request_seconds: float | None = None
    created: int = field(default_factory=lambda: int(time()))
    tokenizer_info: bool = False
    special_tokens_in_content: bool = False
    tool_parser: str | None = None
    cors_origins: tuple[str, ...] = ()
    defaults: SamplingParams = field(default_factory=SamplingParams)
    chat_max_tokens: int | None = None

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.max_model_len, self.max_choices)

    @property
    def body_limit(self) -> int:
        """Bytes of one HTTP request's body."""
        return self.max_body_bytes or body_bytes(self.max_model_len)
