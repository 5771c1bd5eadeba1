"""One streamed request to an OpenAI endpoint, timed where the client is."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp

READ_BUFFER = 1 << 20  # bytes; of a line that holds one event
Show = Callable[[str], object]


@dataclass
class Timing:
    """One request, in seconds.

    Attributes:
        start_time: when it was sent, on `perf_counter`'s clock.
        client_queue_time: how long it waited in this client before; the server knows nothing of it.
        ttft: from sending to the first text. itl: gaps between chunks with text; a chunk may hold several tokens.
        latency: from sending to the last chunk.
        prompt_tokens, output_tokens: as the server counts them.
        error: why it failed; empty if it did not. status: of HTTP; None if no answer began.
    """

    start_time: float = 0.0
    client_queue_time: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    status: int | None = None

    @property
    def success(self) -> bool:
        return not self.error

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 for a single one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def session(**options: Any) -> aiohttp.ClientSession:
    """One that does not itself limit how many requests are under way; `options` are aiohttp's."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=READ_BUFFER, **options)


def no_show(text: str) -> None:
    """Nothing is done with a stream's text as it comes."""


async def stream(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], show: Show = no_show) -> Timing:
    """Send `body` and read the answer to its end; what goes wrong is in the timing's `error`.

    Args:
        show: gets the text of each chunk as it comes.
    """
    timing = Timing(start_time=perf_counter())
    wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(url, json=wanted) as response:
            timing.status = response.status
            if response.status != 200:
                timing.error = f"HTTP {response.status}: {_message(await response.text())}"
            else:
                await _read(response, timing, show)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    return timing


async def _read(response: aiohttp.ClientResponse, timing: Timing, show: Show) -> None:
    last_text, finished, done = 0.0, False, False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        now, data = perf_counter(), line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            timing.error = chunk["error"].get("message", "an error without a message")
            return
        for choice in chunk["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if text and last_text:
                timing.itl.append(now - last_text)
            if text:
                timing.ttft = timing.ttft or now - timing.start_time
                last_text = now
                show(text)
            timing.text += text
            timing.latency = now - timing.start_time
            finished = finished or choice.get("finish_reason") is not None
        if usage := chunk.get("usage"):
            timing.prompt_tokens, timing.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    timing.ttft = timing.ttft or timing.latency  # nothing that could be shown was generated
    if not (done and finished):
        timing.error = "the stream ended early"


def _message(body: str) -> str:
    """The sentence of an error in OpenAI's shape, or the beginning of whatever else came."""
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:200]
