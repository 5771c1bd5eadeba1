"""Between HTTP and engines: requests become token ids, tokens become text and chunks. Knows no HTTP library."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import time
from typing import Any

import msgspec

from stepladder.cluster.gateway.choices import Chat, Choice, Choices, Completion, Format, Piece
from stepladder.cluster.gateway.errors import BadRequest, NotFound, Unavailable
from stepladder.cluster.gateway.inflight import InFlight, InFlightRequest
from stepladder.cluster.gateway.logprob_json import is_broken
from stepladder.cluster.gateway.merge import merge
from stepladder.cluster.gateway.metrics import Metrics, SequenceMeter
from stepladder.cluster.gateway.protocol import (
    ChatRequest,
    CompletionRequest,
    Conversing,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from stepladder.cluster.gateway.router import Router
from stepladder.workers.core import Output, Request, SamplingParams
from stepladder.workers.limits import listed_tokens
from stepladder.workers.text.stream import TextStream, Tokenizer, settled

log = logging.getLogger(__name__)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat may fill the context
TOKENIZE_INLINE = 4096  # characters, about a millisecond; longer texts are tokenized in a thread

_encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What one server serves.

    Attributes:
        model_name: what clients call the model.
        max_model_len: prompt and output together, in tokens; the engines may have room for less.
        vocab_size: token ids from 0 to this are the model's.
        version: of Stepladder.
        api_key: bearer token that requests need, not empty; None lets everybody in.
        max_choices: prompts times n of one HTTP request.
        max_body_bytes: of one HTTP request.
        created: when the model came to be, in Unix seconds.
        tokenizer_info: serve /tokenizer_info.
        defaults: what holds for the sampling parameters that a request leaves out, its seed and max_tokens excepted.
            The only place for such defaults, as of a generation_config.json.
        special_tokens_in_content: what spells a special token in a chat message is one, where a request does not say.
        chat_max_tokens: as many tokens may follow a chat that leaves max_tokens out, if the context has room for them;
            None fills the context.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    version: str
    api_key: str | None = field(default=None, repr=False)
    max_choices: int = 128
    max_body_bytes: int = 16 << 20
    created: int = field(default_factory=lambda: int(time()))
    tokenizer_info: bool = False
    special_tokens_in_content: bool = False
    defaults: SamplingParams = field(default_factory=SamplingParams)
    chat_max_tokens: int | None = None


class OpenAIService:
    """One model behind the OpenAI protocol; used from one event loop."""

    def __init__(self, router: Router, tokenizer: Tokenizer, config: ServiceConfig) -> None:
        self.config, self.metrics, self.in_flight = config, Metrics(config.model_name), InFlight()
        self.metrics.in_flight.set_function(lambda: len(self.in_flight))
        self._router, self.tokenizer = router, tokenizer
        self._broken = False

    @property
    def ready(self) -> bool:
        return not self.in_flight.draining and self._router.ready()

    @property
    def max_model_len(self) -> int:
        """Prompt and output together, in tokens; of the smallest engine, once it has said."""
        return min(self.config.max_model_len, self._router.max_model_len or self.config.max_model_len)

    def card(self) -> dict[str, Any]:
        """The model, as /v1/models describes it."""
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.config.created,
            "owned_by": "stepladder",
            "max_model_len": self.max_model_len,
        }

    async def drain(self, seconds: float) -> None:
        """Admit no more requests; return when all have ended, at the latest after `seconds`."""
        await self.in_flight.drain(seconds)

    def snapshot(self) -> dict[str, float]:
        """Figures since the last snapshot, for the monitor."""
        return self.metrics.window.snapshot() | {"serve/running": float(len(self.in_flight))}

    async def chat(self, body: ChatRequest, http: InFlightRequest) -> Choices:
        """Raises BadRequest or NotFound, as `completion` does."""
        self.check_model(body.model)
        prompt = await self._encode_chat(body.messages, body)
        max_tokens = body.max_completion_tokens or body.max_tokens
        default = self.config.chat_max_tokens or self.config.max_model_len
        limits = [self._max_tokens(prompt, "messages", max_tokens, default)]
        return self._answer(Chat(body.prompt_logprobs), body, http, [prompt], limits)

    async def completion(self, body: CompletionRequest, http: InFlightRequest) -> Choices:
        """A prompt of token ids is taken as it is."""
        self.check_model(body.model)
        if len(body.prompts) * body.n > self.config.max_choices:
            raise BadRequest(
                f"prompts times n is more than {self.config.max_choices}; send several requests", param="n"
            )
        prompts = [await self._encode(p, body.add_special_tokens) if isinstance(p, str) else p for p in body.prompts]
        asked = max(body.max_tokens, 1) if body.max_tokens is not None else None  # the engine draws one at least
        limits = [self._max_tokens(prompt, "prompt", asked, COMPLETION_MAX_TOKENS) for prompt in prompts]
        answer = self._answer(Completion(body.prompt_logprobs), body, http, prompts, limits)
        if body.echo:
            await self._echo(answer.choices, body)
        return answer

    async def _echo(self, choices: list[Choice], body: CompletionRequest) -> None:
        """Have them begin with their prompts."""
        for first in range(0, len(choices), body.n):
            prompt, offsets = body.prompts[first // body.n], list[int]()
            if isinstance(prompt, str):
                text = prompt
                if body.logprobs is not None:
                    offsets = await asyncio.to_thread(self.tokenizer.offsets, text, body.add_special_tokens)
            else:
                decode = self.tokenizer.decode if body.skip_special_tokens else self.tokenizer.decode_all
                whole = body.max_tokens == 0
                text = decode(prompt) if whole else settled(self.tokenizer, prompt, not body.skip_special_tokens)
            for choice in choices[first : first + body.n]:
                choice.echo, choice.echo_offsets = text, offsets
                choice.scoring_only = body.max_tokens == 0

    async def run(self, answer: Choices) -> dict[str, Any]:
        """The whole answer."""
        async with aclosing(self._pieces(answer)) as pieces:
            async for _ in pieces:
                pass
        return answer.body()

    async def stream(self, answer: Choices) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        async with aclosing(self._pieces(answer)) as pieces:
            async for piece in pieces:
                if chunks := answer.chunks(piece):
                    yield b"".join(map(event, chunks))
        options = answer.asked.stream_options
        yield (event(answer.usage_chunk()) if options and options.include_usage else b"") + DONE

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self.check_model(body.model)
        if body.messages is not None:
            tokens = await self._encode_chat(body.messages, body)
        else:
            assert body.prompt is not None
            tokens = await self._encode(body.prompt, special=body.add_special_tokens is not False)
        return {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens, "token_strs": None}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """Special tokens are written out, so that it undoes `tokenize`."""
        self.check_model(body.model)
        self._check_ids(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(self.tokenizer.fast.decode, body.tokens, skip_special_tokens=False)}

    def check_model(self, name: str | None) -> None:
        """Raises NotFound unless it is this one's name, or None."""
        if name not in (None, self.config.model_name):
            sentence = f"the model {name!r} does not exist; this server has {self.config.model_name!r}"
            raise NotFound(sentence, param="model", code="model_not_found")

    async def _encode(self, text: str, special: bool) -> list[int]:
        if len(text) <= TOKENIZE_INLINE:
            return self.tokenizer.encode(text, special)
        return await asyncio.to_thread(self.tokenizer.encode, text, special)

    async def _encode_chat(self, messages: list[Message], body: Conversing) -> list[int]:
        """Chat templates write special tokens themselves."""
        options = body.chat_options(self.config.special_tokens_in_content)
        try:
            text = self.tokenizer.chat([message.for_template() for message in messages], options=options)
            return await self._encode(text, bool(body.add_special_tokens))
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from None

    def _answer(
        self,
        format: Format,
        body: ChatRequest | CompletionRequest,
        http: InFlightRequest,
        prompts: list[list[int]],
        limits: list[int],
    ) -> Choices:
        """n choices per prompt, prompt after prompt; the engine's ids derive from the HTTP request's."""
        choices: list[Choice] = []
        for prompt, max_tokens in zip(prompts, limits, strict=True):
            for nth in range(body.n):
                params, index = self._params(body, max_tokens, nth), len(choices)
                request = Request(id=f"{http.id}-{index}", prompt=tuple(prompt), params=params)
                choices.append(Choice(index, request, TextStream.of(self.tokenizer, params, request.prompt)))
        return Choices(http.id, http.arrived, body, format, choices, sum(map(len, prompts)))

    def _params(self, body: ChatRequest | CompletionRequest, max_tokens: int, nth: int) -> SamplingParams:
        try:
            params = body.params(self.config.defaults, nth, max_tokens=max_tokens, **body.reports)
        except ValueError as error:  # every value has been judged alone; only these two can contradict each other
            raise BadRequest(str(error), param="min_tokens", code="invalid_value") from None
        for name, tokens in listed_tokens(params).items():
            if tokens:
                self._check_ids(list(tokens), name)
        return params

    def _max_tokens(self, prompt: list[int], param: str, asked: int | None, default: int) -> int:
        """How many tokens may follow a prompt: as many as asked for, else the default as far as the context goes."""
        self._check_ids(prompt, param)
        context = self.max_model_len
        room = context - len(prompt)
        if room < max(asked or 1, 1):
            sentence = (
                f"this model's context is {context} tokens, but the prompt has {len(prompt)} and "
                f"{asked or 'at least 1'} may be generated; shorten the prompt or lower max_tokens"
            )
            raise BadRequest(sentence, param=param, code="context_length_exceeded")
        return asked or min(default, room)

    def _check_ids(self, tokens: list[int], param: str) -> None:
        if not tokens:
            raise BadRequest(f"{param} is empty; it must come to at least one token", param=param, code="invalid_value")
        if min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            sentence = f"{param} holds a token id outside of 0 to {self.config.vocab_size - 1}, the model's vocabulary"
            raise BadRequest(sentence, param=param, code="invalid_value")

    async def _pieces(self, answer: Choices) -> AsyncGenerator[Piece, None]:
        """What every output of the engines adds."""
        streams = [self._pieces_of(choice, answer.arrived) for choice in answer.choices]
        async with aclosing(merge(streams)) as pieces:
            async for piece in pieces:
                yield piece
        n, choices = answer.asked.n, answer.choices
        for first in range(0, len(choices), n):
            counts = [choice.num_tokens for choice in choices[first : first + n]]
            self.metrics.answered(choices[first].request.params.max_tokens, counts)

    async def _pieces_of(self, choice: Choice, arrived: float) -> AsyncGenerator[Piece, None]:
        """An end without a reason, or for the engine's own reasons, is an error."""
        meter, ended = SequenceMeter(self.metrics, arrived, len(choice.request.prompt)), "error"
        choice.meter = meter
        try:
            async with aclosing(self._router.generate(choice.request)) as outputs:
                async for output in outputs:
                    if output.finish_reason == "abort":
                        break
                    if not output.tokens and not output.finish_reason:
                        continue  # a retry that found its request still in the queue
                    self._look(output)
                    before = choice.num_tokens
                    piece = choice.take(output)
                    meter.output(choice.num_tokens - before)
                    yield piece
                    if choice.finish_reason:
                        ended = choice.finish_reason
                        return
            raise Unavailable("the engine gave up on this request; try again", retry_after=1)
        except (asyncio.CancelledError, GeneratorExit):
            ended = choice.finish_reason or "abort"
            raise
        finally:
            meter.end(ended, choice.start)

    def _look(self, output: Output) -> None:
        """Say once that a model is broken, as far as its log-probabilities tell."""
        if not self._broken and is_broken(output):
            self._broken = True
            log.error("model %s: its logits are not numbers (NaN); check its weights", self.config.model_name)


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode_json(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
