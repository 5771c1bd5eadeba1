"""The response of a generating endpoint: JSON or a stream, ended when the client leaves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepladder.cluster.gateway.choices import Choices
from stepladder.cluster.gateway.errors import ApiError
from stepladder.cluster.gateway.inflight import InFlightRequest
from stepladder.cluster.gateway.openai_service import DONE, OpenAIService, event

logger = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Disconnected(Exception):
    """The client is gone."""


class Reply(Response):
    """Runs what `prepare` makes. Errors before the first output have a status of their own, later ones are events.

    The answer, and an error that became an event, are left in `scope["state"]` for middleware.
    """

    def __init__(
        self,
        service: OpenAIService,
        request_id: str,
        owner: str,
        prepare: Callable[[InFlightRequest], Awaitable[Choices]],
    ) -> None:
        self._service, self._request_id, self._owner, self._prepare = service, request_id, owner, prepare
        self._started = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._entered(receive) as request:
                answer = scope["state"]["answer"] = await self._prepare(request)
                if answer.asked.stream:
                    await self._stream(answer, send)
                    return
                body = await self._service.run(answer)
            await Response(body, media_type="application/json")(scope, receive, send)
        except Disconnected:
            pass
        except Exception as error:
            if not self._started:
                raise
            scope["state"]["error"] = error
            await _send_error(error, send)

    @asynccontextmanager
    async def _entered(self, receive: Receive) -> AsyncIterator[InFlightRequest]:
        async with self._service.in_flight.enter(self._request_id, self._owner) as request, _watched(receive, request):
            yield request

    async def _stream(self, answer: Choices, send: Send) -> None:
        async with aclosing(self._service.stream(answer)) as events:
            async for data in events:
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _send_error(error: Exception, send: Send) -> None:
    """After the 200: an event that clients raise as an error."""
    if not isinstance(error, ApiError):
        logger.error("a stream failed", exc_info=error)
        error = ApiError("internal error")
    await send({"type": "http.response.body", "body": event(error.body) + DONE})


@asynccontextmanager
async def _watched(receive: Receive, request: InFlightRequest) -> AsyncIterator[None]:
    """End the request when its client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        request.end(Disconnected())

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
