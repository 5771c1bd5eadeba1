"""Between HTTP and engines: requests become token ids, tokens become text and chunks. Knows no HTTP library."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from stepladder.cluster.gateway.choices import Chat, Choice, Choices, Completion, Format, Piece
from stepladder.cluster.gateway.errors import BadRequest, NotFound, Overloaded, Unavailable
from stepladder.cluster.gateway.inflight import InFlight, InFlightRequest
from stepladder.cluster.gateway.logprob_json import encode_json, is_broken
from stepladder.cluster.gateway.merge import merge
from stepladder.cluster.gateway.metrics import Metrics, SequenceMeter
from stepladder.cluster.gateway.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from stepladder.cluster.gateway.reading import read
from stepladder.cluster.gateway.router import Router
from stepladder.cluster.gateway.service_config import ServiceConfig
from stepladder.cluster.gateway.strict_json import Body
from stepladder.cluster.gateway.tools import ToolPlan, plan
from stepladder.cluster.gateway.work_pool import WorkPool
from stepladder.workers.core import Output, Request, SamplingParams, StructuredOutputs
from stepladder.workers.grammar.compiler import Grammars
from stepladder.workers.limits import listed_tokens
from stepladder.workers.text.control_tokens import plain
from stepladder.workers.text.stream import TextStream, settled
from stepladder.workers.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat may fill the context
INLINE = 32  # tokens whose log-probabilities, or messages that, are written at once; more are in a thread
MOST_COMPILING = 32  # grammars at once, each of which may take a second
INLINE_SHARE = 128  # characters that are tokenized in the time that one of those takes

T = TypeVar("T")
B = TypeVar("B", bound=Body)


class OpenAIService:
    """One model behind the OpenAI protocol; used from one event loop."""

    def __init__(self, router: Router, tokenizer: Tokenizer, config: ServiceConfig) -> None:
        self.config, self.metrics, self.in_flight = config, Metrics(config.model_name), InFlight()
        self.metrics.in_flight.set_function(lambda: len(self.in_flight))
        self._router, self.tokenizer = router, tokenizer
        tokenizer.prepare()
        self._pool, self._broken = WorkPool(), False
        self._grammars, self._compiling = Grammars(lambda: tokenizer, config.vocab_size), 0

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
            "root": self.config.root or self.config.model_name,
            "parent": None,
            "max_model_len": self.max_model_len,
        }

    async def read(self, http: HttpRequest, kind: type[B]) -> B:
        """The body of a request, or BadRequest."""
        return await read(http, kind, self.config.bounds, self._pool)

    async def drain(self, seconds: float) -> None:
        """Admit no more requests; return when all have ended, at the latest after `seconds`."""
        await self.in_flight.drain(seconds)

    def snapshot(self) -> dict[str, float]:
        """Figures since the last snapshot, for the monitor."""
        return self.metrics.window.snapshot() | {"serve/running": float(len(self.in_flight))}

    async def chat(self, body: ChatRequest, http: InFlightRequest) -> Choices:
        """Raises BadRequest or NotFound, as `completion` does."""
        self._begin(body, http)
        tools = plan(body, body.form[1], self.tokenizer, self.config.tool_parser)
        structure = await self._structure(body, tools)
        prompt = await self._encode_chat(body.messages, body, fits="messages")
        max_tokens = body.max_completion_tokens or body.max_tokens
        default = self.config.chat_max_tokens or self.config.max_model_len
        limits = [self._max_tokens(prompt, "messages", max_tokens, default)]
        return self._answer(Chat(body.prompt_logprobs), body, http, [prompt], limits, structure, tools)

    async def completion(self, body: CompletionRequest, http: InFlightRequest) -> Choices:
        """A prompt of token ids is taken as it is."""
        self._begin(body, http)
        if len(body.prompts) * body.n > self.config.max_choices:
            raise BadRequest(
                f"prompts times n is more than {self.config.max_choices}; send several requests", param="n"
            )
        special = body.add_special_tokens
        prompts = [await self._encode(p, special, "prompt") if isinstance(p, str) else p for p in body.prompts]
        asked = max(body.max_tokens, 1) if body.max_tokens is not None else None  # the engine draws one at least
        limits = [self._max_tokens(prompt, "prompt", asked, COMPLETION_MAX_TOKENS) for prompt in prompts]
        structure = await self._structure(body)
        answer = self._answer(Completion(body.prompt_logprobs), body, http, prompts, limits, structure)
        if body.echo:
            await self._echo(answer.choices, body)
        return answer

    async def _echo(self, choices: list[Choice], body: CompletionRequest) -> None:
        """Have them begin with their prompts."""
        skip = body.skip_special_tokens
        for first in range(0, len(choices), body.n):
            prompt, offsets = body.prompts[first // body.n], list[int]()
            if isinstance(prompt, str):
                text = prompt
                if body.logprobs is not None:
                    offsets = await self._pool.run(self.tokenizer.offsets, text, body.add_special_tokens)
            elif body.max_tokens == 0:
                text = await self._pool.run(self.tokenizer.decode, prompt, skip)
            else:
                text = await self._pool.run(settled, self.tokenizer, prompt, not skip)
            for choice in choices[first : first + body.n]:
                choice.echo, choice.echo_offsets = text, offsets
                choice.scoring_only = body.max_tokens == 0

    def _begin(self, body: ChatRequest | CompletionRequest, http: InFlightRequest) -> None:
        self.check_model(body.model)
        if seconds := min((s for s in (body.timeout, self.config.request_seconds) if s), default=None):
            http.must_end(seconds)

    async def run(self, answer: Choices) -> bytes:
        """The whole answer, as JSON."""
        async with aclosing(self._pieces(answer)) as pieces:
            async for _ in pieces:
                pass
        return await self._work(answer.body, answer.num_reported)

    async def stream(self, answer: Choices) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        async with aclosing(self._pieces(answer)) as pieces:
            async for piece in pieces:
                if events := await self._work(partial(_events, answer, piece), len(piece.scored)):
                    yield events
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
        return {"prompt": await self._pool.run(partial(self.tokenizer.decode, skip_special=False), body.tokens)}

    def check_model(self, name: str | None) -> None:
        """Raises NotFound unless it is this one's name, or None."""
        if name not in (None, self.config.model_name):
            sentence = f"the model {name!r} does not exist; this server has {self.config.model_name!r}"
            raise NotFound(sentence, param="model", code="model_not_found")

    async def _encode(self, text: str, special: bool, fits: str | None = None) -> list[int]:
        """With `fits`, the name of a parameter, what cannot fit into the context is refused before it is tokenized."""
        at_least, context = len(plain(text)) // self.tokenizer.longest, self.max_model_len
        if fits and at_least > context:
            sentence = f"this model's context is {context} tokens, but the prompt has more than {at_least}; shorten it"
            raise BadRequest(sentence, param=fits, code="context_length_exceeded")
        return await self._work(partial(self.tokenizer.encode, text, special), len(text) // INLINE_SHARE)

    async def _encode_chat(
        self, messages: list[Message], body: ChatRequest | TokenizeRequest, fits: str | None = None
    ) -> list[int]:
        """Chat templates write special tokens themselves."""
        options, tools = body.chat_options(self.config.special_tokens_in_content), body.shown_tools
        variables = len(str(body.chat_template_kwargs)) + len(str(tools))
        try:
            text = await self._work(
                lambda: self.tokenizer.chat([message.for_template() for message in messages], tools, options),
                len(messages) + (sum(message.length for message in messages) + variables) // INLINE_SHARE,
            )
            return await self._encode(text, bool(body.add_special_tokens), fits)
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from None

    async def _work(self, work: Callable[[], T], size: int) -> T:
        """Here if it is small, else in a thread, so that nobody waits for it."""
        return work() if size <= INLINE else await self._pool.run(work)

    def _answer(
        self,
        format: Format,
        body: ChatRequest | CompletionRequest,
        http: InFlightRequest,
        prompts: list[list[int]],
        limits: list[int],
        structure: StructuredOutputs | None = None,
        tools: ToolPlan | None = None,
    ) -> Choices:
        """n choices per prompt, prompt after prompt; the engine's ids derive from the HTTP request's."""
        choices, owner = list[Choice](), _owner(http, body)
        for prompt, max_tokens in zip(map(tuple, prompts), limits, strict=True):
            first = self._params(body, max_tokens, structure, tools)
            for nth in range(body.n):
                params, index = first.choice(nth), len(choices)
                request = Request(
                    id=f"{http.id}-{index}", prompt=prompt, params=params, owner=owner,
                    seeded="seed" in body.model_fields_set, domain=body.metadata.domain, learn=body.metadata.learn,
                )  # fmt: skip
                text, parser = TextStream.of(self.tokenizer, params, prompt), tools.parser() if tools else None
                choices.append(Choice(index, request, text, tools=parser))
        self._check_reported([choice.request for choice in choices])
        return Choices(http.id, http.arrived, http.until, body, format, choices, sum(map(len, prompts)))

    async def _structure(
        self, body: ChatRequest | CompletionRequest, tools: ToolPlan | None = None
    ) -> StructuredOutputs | None:
        """The form of the text; BadRequest if it cannot be had. It is compiled in a thread, of which there is one."""
        param, form = ("tools", tools.structure) if tools else body.form
        if form is None:
            return None
        if self._compiling >= MOST_COMPILING:
            raise Overloaded("too many grammars wait to be compiled; try again later", retry_after=1)
        self._compiling += 1
        try:
            await asyncio.wrap_future(self._grammars.check(form))
        except ValueError as error:
            raise BadRequest(f"{param}: {error}", param=param, code="invalid_value") from None
        finally:
            self._compiling -= 1
        return form

    def _params(
        self,
        body: ChatRequest | CompletionRequest,
        max_tokens: int,
        structure: StructuredOutputs | None,
        tools: ToolPlan | None,
    ) -> SamplingParams:
        try:
            fields = {"max_tokens": max_tokens, "structured_outputs": structure, **body.reports}
            if tools and tools.special:
                fields["skip_special_tokens"] = False
            params = body.params(self.config.defaults, **fields)
        except ValueError as error:  # every value has been judged alone; only these two can contradict each other
            raise BadRequest(str(error), param="min_tokens", code="invalid_value") from None
        for name, tokens in listed_tokens(params).items():
            if tokens:
                self._check_ids(list(tokens), name)
        return params

    def _check_reported(self, requests: list[Request]) -> None:
        """An answer may not become larger than anybody reads."""
        entries, most = sum(map(_reported, requests)), self.config.max_reported
        if entries > most:
            raise BadRequest(
                f"logprobs and prompt_logprobs ask for {entries} log-probabilities (prompts times n, their tokens, and "
                f"the likeliest beside each); this server gives at most {most} in one answer",
                param="logprobs" if requests[0].params.prompt_logprobs is None else "prompt_logprobs",
                code="invalid_value",
            )

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
        streams = [self._pieces_of(choice, answer) for choice in answer.choices]
        async with aclosing(merge(streams)) as pieces:
            async for piece in pieces:
                yield piece
        n, choices = answer.asked.n, answer.choices
        for first in range(0, len(choices), n):
            counts = [choice.num_tokens for choice in choices[first : first + n]]
            self.metrics.answered(choices[first].request.params.max_tokens, counts)

    async def _pieces_of(self, choice: Choice, answer: Choices) -> AsyncGenerator[Piece, None]:
        """An end without a reason, or for the engine's own reasons, is an error."""
        meter, ended = SequenceMeter(self.metrics, answer.arrived, len(choice.request.prompt)), "error"
        choice.meter = meter
        try:
            async with aclosing(self._router.generate(choice.request, answer.until)) as outputs:
                async for output in outputs:
                    if output.finish_reason == "abort" and output.error:
                        raise BadRequest(output.error, code="invalid_value")
                    if output.finish_reason == "abort":
                        break
                    if not output.tokens and not output.finish_reason:
                        continue  # a retry that found its request still in the queue
                    self._look(output)
                    before = choice.num_tokens
                    piece = await self._work(partial(choice.take, output), len(output.prompt_logprobs or ()))
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


def _owner(http: InFlightRequest, body: ChatRequest | CompletionRequest) -> str:
    """Whose requests continue one another: those of one key that name the same seed, or none."""
    parts = [http.owner] + ([f"seed {body.seed}"] if "seed" in body.model_fields_set else [])
    return blake2b(" ".join(parts).encode(), digest_size=8).hexdigest() if any(parts) else ""


def _reported(request: Request) -> int:
    """Log-probabilities that an answer to this holds at most."""
    params, found = request.params, 0
    if params.prompt_logprobs is not None:
        found += len(request.prompt) * (params.prompt_logprobs + 1)
    if params.logprobs is not None:
        found += params.max_tokens * (params.logprobs + 1)
    return found


def _events(answer: Choices, piece: Piece) -> bytes:
    return b"".join(map(event, answer.chunks(piece)))


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
