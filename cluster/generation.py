"""One generating HTTP request: its choices, and the JSON that they become."""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.protocol import StreamOptions
from workers.core import FinishReason, Output, Request
from workers.text import TextStream

Json = dict[str, Any]


@dataclass
class Choice:
    """One engine request and the text that it has become.

    Attributes:
        num_tokens: generated, including those of a stop string or end of sequence.
        started: its first chunk has been made.
    """

    index: int
    request: Request
    text: TextStream
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    started: bool = False

    def take(self, output: Output) -> str:
        """Append an output's tokens, up to a stop string; return the text that can be shown now."""
        fresh = ""
        for token in output.tokens:
            fresh += self.text.push([token])
            self.num_tokens += 1
            if self.text.stopped:
                break
        if output.finish_reason:
            fresh += self.text.push([], finished=True)
        self.finish_reason = "stop" if self.text.stopped else output.finish_reason
        return fresh


class Format(Protocol):
    """How an endpoint writes choices; `Chat` and `Completion` do."""

    prefix: str
    object: str
    chunk_object: str

    def whole(self, choice: Choice) -> Json: ...

    def part(self, choice: Choice, text: str, finish_reason: FinishReason | None) -> Json: ...


class Chat:
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text.text, "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}

    def part(self, choice: Choice, text: str, finish_reason: FinishReason | None) -> Json:
        delta = {} if choice.started else {"role": "assistant"}
        if finish_reason is None:
            delta["content"] = text
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class Completion:
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def whole(self, choice: Choice) -> Json:
        return self.part(choice, choice.text.text, choice.finish_reason)

    def part(self, choice: Choice, text: str, finish_reason: FinishReason | None) -> Json:
        return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": finish_reason}


@dataclass
class Generation:
    """What an HTTP request asks for, ready to run.

    Attributes:
        id: of the request, without the endpoint's prefix.
        arrived: `time.monotonic()` when the request came in.
        num_prompt_tokens: of all prompts, each counted once.
        stream: answer with chunks; with these options.
    """

    id: str
    arrived: float
    model: str
    format: Format
    choices: list[Choice]
    num_prompt_tokens: int
    stream: bool
    options: StreamOptions
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> Json:
        generated = sum(choice.num_tokens for choice in self.choices)
        total = self.num_prompt_tokens + generated
        return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def body(self) -> Json:
        """The whole answer, once every choice has finished."""
        choices = [self.format.whole(choice) for choice in self.choices]
        return self._envelope(self.format.object, choices) | {"usage": self.usage}

    def chunks(self, choice: Choice, text: str) -> list[Json]:
        """What to send for new text of a choice: nothing while it is held back, and the end as a chunk of its own."""
        chunks = []
        if text or not choice.started:
            chunks.append(self._chunk(self.format.part(choice, text, None)))
            choice.started = True
        if choice.finish_reason:
            chunks.append(self._chunk(self.format.part(choice, "", choice.finish_reason)))
        return chunks

    def usage_chunk(self) -> Json:
        """The last chunk of a stream with include_usage."""
        return self._envelope(self.format.chunk_object, []) | {"usage": self.usage}

    def _chunk(self, choice: Json) -> Json:
        chunk = self._envelope(self.format.chunk_object, [choice])
        if self.options.continuous_usage_stats:
            chunk["usage"] = self.usage
        elif self.options.include_usage:
            chunk["usage"] = None
        return chunk

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.format.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
