"""What every HTTP request passes first: its id, the API key, the size of its body, and the last net for errors."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepladder.cluster.gateway.api_keys import ApiKeys
from stepladder.cluster.gateway.errors import ApiError, BadRequest, BodyTooLarge, Unauthorized

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # for probes and scrapers, which have no key
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Gatekeeper:
    """ASGI middleware. The request's id is in `request.state.request_id` and echoed as X-Request-Id; `owner` beside it
    is the hash of its API key, and `status` the answer's, once that has begun.

    Args:
        keys: bearer tokens, of which all but OPEN_PATHS need one.
        max_body_bytes: larger bodies are refused.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_body_bytes: int) -> None:
        self._app, self._keys, self._max_body_bytes = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        given = headers.get("x-request-id")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            state["owner"] = self._owner(scope["path"], headers)
            self._check(headers, given not in (None, request_id))
            await self._app(scope, self._bounded(receive), send_with_id)
        except ClientDisconnect:
            pass
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if "status" not in state:
                await ApiError("internal error").response()(scope, receive, send_with_id)

    def _owner(self, path: str, headers: Headers) -> str:
        """The hash of the request's key; empty where none is needed."""
        if not self._keys.needed or path in OPEN_PATHS:
            return ""
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        key = sent.encode("latin-1").decode("utf-8", "replace")
        if scheme.lower() != "bearer" or not (owner := self._keys.owner(key)):
            raise Unauthorized("this server needs its API key: send Authorization: Bearer <key>")
        return owner

    def _check(self, headers: Headers, bad_id: bool) -> None:
        if bad_id:
            raise BadRequest("X-Request-Id must be 1 to 128 letters, digits or any of _.:/+=-", param="X-Request-Id")
        if int(headers.get("content-length", 0)) > self._max_body_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Count a body that comes in chunks without saying how long it is."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than this server takes ({self._max_body_bytes} bytes)")
