"""One generating HTTP request: its choices, and the JSON that they become."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import msgspec

from stepladder.cluster.gateway.logprob_json import (
    Json,
    ScoredToken,
    chat_shape,
    completion_shape,
    encode_json,
    prompt_shape,
)
from stepladder.cluster.gateway.metrics import SequenceMeter
from stepladder.cluster.gateway.protocol import Generating
from stepladder.workers.core import FinishReason, Output, Request, Start, TokenLogprob
from stepladder.workers.text.stream import TextStream
from stepladder.workers.text.tool_calls import ToolParser


@dataclass
class Choice:
    """One engine request and the text that it has become.

    Attributes:
        echo: the prompt's text, if the answer begins with it.
        echo_offsets: where in it each token of the prompt begins; found by decoding if left out.
        scoring_only: the prompt is all that is wanted; the engine's one token is dropped.
        num_tokens: generated, including those of a stop string or end of sequence.
        drafted, accepted: tokens that were drafted for it, and those of them that it went on with.
        started: its first chunk has been made.
        scored: its tokens with their log-probabilities, if wanted.
        prompt_logprobs: of the prompt's tokens from the second on, if wanted.
        start: how the engine came to the first token; None before it, or if another gateway was told.
        meter: its clock, once it runs.
        tools: splits its text into content and calls of tools, if it may hold such.
        content, calls: what it has become so far, with `tools`; calls as a message has them.
    """

    index: int
    request: Request
    text: TextStream
    echo: str = ""
    echo_offsets: Sequence[int] = ()
    scoring_only: bool = False
    num_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    finish_reason: FinishReason | None = None
    started: bool = False
    scored: list[ScoredToken] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    start: Start | None = None
    meter: SequenceMeter | None = None
    tools: ToolParser | None = None
    content: str = ""
    calls: list[Json] = field(default_factory=list)
    _begun: bool = False

    def take(self, output: Output) -> "Piece":
        """Append an output's tokens, up to a stop string; return what is new."""
        scored_before = len(self.scored)
        fresh = "" if self._begun else self._begin(output)
        if self.scoring_only:
            self.finish_reason = "length"
        else:
            fresh += self._append(output)
        fresh, calls = self._split(fresh)
        return Piece(self, fresh, self.scored[scored_before:], self.finish_reason, calls)

    @property
    def reason(self) -> str | None:
        """Its finish reason as a chat has it."""
        return "tool_calls" if self.calls and self.finish_reason == "stop" else self.finish_reason

    def _split(self, fresh: str) -> tuple[str, list[Json]]:
        """New text as content and what is new of calls, as a stream has it."""
        if self.tools is None:
            return fresh, []
        events = self.tools.push(fresh, finished=self.finish_reason is not None)
        text, deltas = "".join(event.text for event in events), dict[int, Json]()
        self.content += text
        for index, name, arguments in ((e.call, e.name, e.arguments) for e in events if e.call >= 0):
            if name is not None:
                began = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                self.calls.append({**began, "function": {"name": name, "arguments": ""}})
                deltas[index] = {"index": index, **began, "function": {"name": name, "arguments": ""}}
            delta = deltas.setdefault(index, {"index": index, "function": {"arguments": ""}})
            for function in (delta["function"], self.calls[index]["function"]):
                function["arguments"] += arguments
        return text, list(deltas.values())

    def _append(self, output: Output) -> str:
        fresh, visible = "", self.text.visible(output)
        self.drafted, self.accepted = self.drafted + output.drafted, self.accepted + output.accepted
        for nth, token in enumerate(output.tokens):
            if output.logprobs is not None:
                self.scored.append(ScoredToken(token, len(self.echo) + len(self.text), output.logprobs[nth]))
            fresh += self.text.push([token] if nth < visible else [])
            self.num_tokens += 1
            if self.text.stopped:
                break
        if output.finish_reason:
            fresh += self.text.push([], finished=True)
        self.finish_reason = "stop" if self.text.stopped else output.finish_reason
        return fresh

    def _begin(self, output: Output) -> str:
        """What comes before the first token: the prompt, if it is echoed, and its log-probabilities."""
        self._begun = True
        self.prompt_logprobs, self.start = output.prompt_logprobs, output.start
        if self.echo and output.prompt_logprobs is not None and output.logprobs is not None:
            logprobs = [None, *output.prompt_logprobs]
            where = self.echo_offsets or self._offsets()
            self.scored.extend(map(ScoredToken, self.request.prompt, where, logprobs))
        return self.echo

    def _offsets(self) -> list[int]:
        """Where the text of each token of the prompt begins; that of a special token that is left out is empty."""
        special = not self.request.params.skip_special_tokens
        text, found = TextStream(self.text.tokenizer, special=special), []
        for token in self.request.prompt:
            found.append(min(len(text), len(self.echo)))
            text.push([token])
        return found


class Piece(NamedTuple):
    """What one output added to a choice. Its own copy: the choice may be further when the piece is sent.

    text: what can be shown now. scored: tokens with their log-probabilities, also those whose text is held back.
    calls: what is new of calls of tools.
    """

    choice: Choice
    text: str
    scored: list[ScoredToken]
    finish_reason: FinishReason | None
    calls: Sequence[Json] = ()


@dataclass(frozen=True)
class Format(ABC):
    """How an endpoint writes choices; `Chat` and `Completion` do.

    Attributes:
        prompt_top: how many likeliest tokens prompt_logprobs show; None shows none.
    """

    prompt_top: int | None
    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def whole(self, choice: Choice) -> Json: ...

    @abstractmethod
    def part(self, piece: Piece) -> Json:
        """For a chunk; if the piece has a finish reason, it has no text."""

    def extra(self, choices: list[Choice]) -> Json:
        """Further fields of the whole answer."""
        return {}

    def _prompt_logprobs(self, choice: Choice) -> Json:
        if self.prompt_top is None:
            return {}
        assert choice.prompt_logprobs is not None
        tokenizer, prompt = choice.text.tokenizer, choice.request.prompt
        return {"prompt_logprobs": prompt_shape(tokenizer, prompt, choice.prompt_logprobs, self.prompt_top)}


class Chat(Format):
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, choice: Choice) -> Json:
        content = choice.text.text if choice.tools is None else choice.content
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message |= {"content": content or None, "tool_calls": choice.calls}
        logprobs = self._logprobs(choice, choice.scored)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def part(self, piece: Piece) -> Json:
        choice, text, scored, finish_reason, calls = piece
        delta: Json = {} if choice.started else {"role": "assistant"}
        if calls:
            delta |= {"content": text or None} if text or delta else {}
            delta["tool_calls"] = calls
        elif finish_reason is None:
            delta["content"] = text
        logprobs = self._logprobs(choice, scored) if scored else None
        reason = choice.reason if finish_reason else None
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def extra(self, choices: list[Choice]) -> Json:
        """All choices have the same prompt."""
        return self._prompt_logprobs(choices[0])

    def _logprobs(self, choice: Choice, scored: list[ScoredToken]) -> Json | None:
        return None if choice.request.params.logprobs is None else chat_shape(choice.text.tokenizer, scored)


class Completion(Format):
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def whole(self, choice: Choice) -> Json:
        piece = Piece(choice, choice.echo + choice.text.text, choice.scored, choice.finish_reason)
        return self.part(piece) | self._prompt_logprobs(choice)

    def part(self, piece: Piece) -> Json:
        choice, text, scored, finish_reason, _ = piece
        top, logprobs = choice.request.params.logprobs, None
        if top is not None and scored:
            logprobs = completion_shape(choice.text.tokenizer, scored, top)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


@dataclass
class Choices:
    """What an HTTP request asks for, ready to run.

    Attributes:
        id: of the request, without the endpoint's prefix.
        arrived: `time.monotonic()` when the request came in. until: when its client will be gone, if anybody knows.
        asked: what the client sent.
        num_prompt_tokens: of all prompts, each counted once.
    """

    id: str
    arrived: float
    until: float | None
    asked: Generating
    format: Format
    choices: list[Choice]
    num_prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> Json:
        generated = sum(choice.num_tokens for choice in self.choices)
        total = self.num_prompt_tokens + generated
        cached = min(self.num_prompt_tokens, sum(choice.start.cached_tokens for choice in self.choices if choice.start))
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": cached},
            **self._predicted(),
        }

    def _predicted(self) -> Json:
        """Drafted tokens, as OpenAI has them, if there were any."""
        drafted, accepted = (sum(getattr(c, name) for c in self.choices) for name in ("drafted", "accepted"))
        found = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        return {"completion_tokens_details": found} if drafted else {}

    @property
    def num_reported(self) -> int:
        """Tokens with log-probabilities."""
        return sum(len(choice.scored) + len(choice.prompt_logprobs or ()) for choice in self.choices)

    def body(self) -> bytes:
        """The whole answer, once every choice has finished. In a thread, others run between any two choices."""
        choices = [msgspec.Raw(encode_json(self.format.whole(choice))) for choice in self.choices]
        extra = self.format.extra(self.choices)
        return encode_json(self._envelope(self.format.object, choices) | {"usage": self.usage} | extra)

    def chunks(self, piece: Piece) -> list[Json]:
        """What to send for a piece: nothing while its text is held back, and the end as a chunk of its own."""
        choice, chunks = piece.choice, []
        if piece.text or piece.scored or piece.calls or not choice.started:
            chunks.append(self._chunk(self.format.part(piece._replace(finish_reason=None))))
            choice.started = True
        if piece.finish_reason:
            chunks.append(self._chunk(self.format.part(piece._replace(text="", scored=[], calls=()))))
        return chunks

    def usage_chunk(self) -> Json:
        """The last chunk of a stream with include_usage."""
        return self._envelope(self.format.chunk_object, []) | {"usage": self.usage}

    def _chunk(self, choice: Json) -> Json:
        chunk, options = self._envelope(self.format.chunk_object, [choice]), self.asked.stream_options
        if options and options.continuous_usage_stats:
            chunk["usage"] = self.usage
        elif options and options.include_usage:
            chunk["usage"] = None
        return chunk

    def _envelope(self, kind: str, choices: Sequence[Json | msgspec.Raw]) -> Json:
        return {
            "id": self.format.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
        }
