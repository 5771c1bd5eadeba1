"""What one HTTP client may take of the server: connections, headers, pipelines, and time. Uvicorn's protocol on
httptools has no such limits of its own; this one counts what it is fed."""

import asyncio
import json
import logging
import resource
from dataclasses import dataclass
from math import ceil
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from stepladder.cluster.gateway.errors import ApiError, BadRequest, BodyTooLarge, Unavailable

logger = logging.getLogger(__name__)

FILES = 256  # that a gateway may have open besides its clients' connections
PIECE = 16 << 10  # bytes that are parsed before anything is judged


class HeadersTooLarge(ApiError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class TooSlow(ApiError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Of one server.

    Attributes:
        connections: more are answered with 503; None takes as many as this process may have files open, at most 4096.
        header_bytes: request line and headers of one request.
        body_bytes: what follows them, with all that chunks and trailers add. Far more than the application takes, which
            answers in better words.
        header_seconds: from a connection's first moment, or a request's first byte, to the end of its headers.
        body_seconds: from there to the end of its body.
        write_seconds: how long a client may leave unread what it was sent.
        pipelined: requests that may wait on a connection behind the one that is being answered.
    """

    connections: int | None = None
    header_bytes: int = 64 << 10
    body_bytes: int = 64 << 20
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    write_seconds: float = 60.0
    pipelined: int = 16


def http_config(app: Any, limits: HttpLimits, **options: Any) -> uvicorn.Config:
    """Of a server with these limits."""
    most = limits.connections or max(FILES, min(4096, open_files() - FILES))
    protocol = type("Limited", (LimitedProtocol,), {"limits": limits, "most": most})
    return uvicorn.Config(
        app, http=protocol, log_level="warning", access_log=False, timeout_graceful_shutdown=5, **options
    )


def open_files() -> int:
    """How many files this process may have open, once it has raised that as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class LimitedProtocol(HttpToolsProtocol):
    """One connection. A clock runs while the client owes us something: headers, a body, or reading what it was sent."""

    limits: HttpLimits
    most: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._bytes, self._in_headers, self._refused = 0, True, False
        self._clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            self._refuse(Unavailable("this server has as many connections as it takes; try again", retry_after=1))
        else:
            self._await("headers", self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for begin in range(0, len(data), PIECE):
            if self._refused or self.transport.is_closing():
                return
            piece = data[begin : begin + PIECE]
            self._bytes += len(piece)
            super().data_received(piece)
            self._judge()

    def _judge(self) -> None:
        """After each piece."""
        limits = self.limits
        if self._in_headers and self._bytes > limits.header_bytes:
            self._refuse(
                HeadersTooLarge(f"the headers are larger than this server takes ({limits.header_bytes} bytes)")
            )
        elif self._bytes > limits.header_bytes + limits.body_bytes:
            self._refuse(BodyTooLarge("the body is larger than this server takes"))
        elif len(self.pipeline) > limits.pipelined:
            self._refuse(BadRequest(f"more than {limits.pipelined} requests wait on this connection"))

    def on_message_begin(self) -> None:
        self._in_headers, self._bytes = True, 0
        self._await("headers", self.limits.header_seconds)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._await("body", self.limits.body_seconds)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._bytes = 0
        self._stop_clock()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock = self._write_clock or self.loop.call_later(self.limits.write_seconds, self._unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_clock:
            self._write_clock.cancel()
            self._write_clock = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest(msg))

    def _unread(self) -> None:
        logger.warning("a client has not read for %.0f s what it was sent; it is cut off", self.limits.write_seconds)
        self.transport.abort()

    def _await(self, what: str, seconds: float) -> None:
        """The client owes us something, within so many seconds."""
        self._stop_clock()
        self._clock = self.loop.call_later(seconds, self._late, what, seconds)

    def _late(self, what: str, seconds: float) -> None:
        if self.flow.read_paused:  # it may have sent everything: we do not look
            self._await(what, seconds)
        else:
            self._refuse(TooSlow(f"the {what} did not come within {seconds:g} s"))

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; only close where an answer to an earlier request, or to this one, is under way."""
        self._refused = True
        self._stop_clock()
        if not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_answer(error))
            self.transport.close()


def _answer(error: ApiError) -> bytes:
    body = json.dumps(error.body).encode()
    retry = b"" if error.retry_after is None else b"retry-after: %d\r\n" % ceil(error.retry_after)
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
    return STATUS_LINE[error.status] + head + retry + b"\r\n" + body
