"""Errors in OpenAI's shape, {"error": {message, type, param, code}}: the only shape this server answers errors in."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response


class ApiError(Exception):
    """An answer that is an error; also raised after the 200 of a stream, where it becomes a last event.

    Args:
        message: for the client.
        param: the request field that it is about.
        code: a word that programs can test for; the class's own if not given.
        retry_after: seconds after which another try makes sense.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after = message, param, retry_after
        self.code = code or self.code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}
        # ASCII only: the message may quote a lone surrogate of the request, which UTF-8 cannot hold
        return Response(json.dumps(self.body), self.status, headers, "application/json")


class BadRequest(ApiError):
    status, type = 400, "invalid_request_error"


class Unauthorized(ApiError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class NotFound(ApiError):
    status, type = 404, "invalid_request_error"


class BodyTooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class Overloaded(ApiError):
    """The engines' queues are full: 429."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Unavailable(ApiError):
    """There is no engine, or this server is draining: 503."""

    status, type, code = 503, "server_error", "service_unavailable"


class Late(Unavailable):
    """The time that was given to the request is over."""

    code = "deadline_exceeded"


def install_handlers(app: FastAPI) -> None:
    """Answer FastAPI's own errors, such as unknown routes, in OpenAI's shape, as `Gatekeeper` does with ours."""
    app.exception_handler(HTTPException)(_from_http)


def from_validation(error: Mapping[str, Any]) -> BadRequest:
    """One of pydantic's errors as a 400 that names the field."""
    kind, context = error["type"], error.get("ctx", {})
    param = context.get("param") or _path(error["loc"])
    match kind:
        case "unsupported_parameter":
            return BadRequest(error["msg"], param=param, code=kind)
        case "extra_forbidden":
            return BadRequest(f"unknown parameter: {param!r}", param=param, code="unknown_parameter")
        case "missing":
            return BadRequest(f"{param} is required", param=param, code="missing_required_parameter")
        case "value_error":
            return BadRequest(str(context["error"]), param=param, code="invalid_value")
    return BadRequest(f"{param or 'the body'}: {error['msg']}", param=param, code="invalid_value")


async def _from_http(request: Request, error: HTTPException) -> Response:
    """Starlette's own refusals: an unknown path, a wrong method, a body that cannot be read (and why)."""
    if isinstance(error.__cause__, ApiError):
        return error.__cause__.response()
    where = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {where}", 405: f"{where} is not allowed; use another method"}
    answer = ApiError(messages.get(error.status_code, str(error.detail)))
    answer.status = error.status_code
    answer.type = "invalid_request_error" if error.status_code < 500 else answer.type
    response = answer.response()
    response.headers.update(error.headers or {})
    return response


def _path(location: Sequence[str | int]) -> str | None:
    """("messages", 0, "content") -> "messages[0].content"."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location]
    return "".join(steps).lstrip(".") or None
