"""From the bytes of a body to a request: its size is known before it is read, and the first error is the answer."""

import re
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from stepladder.cluster.gateway.errors import BadRequest, from_validation
from stepladder.cluster.gateway.strict_json import Body, Bounds
from stepladder.cluster.gateway.work_pool import WorkPool
from stepladder.workers.nesting import TooDeep, read_json

INLINE = 8192  # bytes; a longer body is judged in a thread
BASE_BYTES, BYTES_PER_TOKEN = 256 << 10, 16  # of a body; a token of CJK text is 12 bytes when JSON spells it in ASCII

B = TypeVar("B", bound=Body)


def body_bytes(max_model_len: int) -> int:
    """How long a body may be that asks for something within the context."""
    return BASE_BYTES + BYTES_PER_TOKEN * max_model_len


async def read(http: Request, kind: type[B], bounds: Bounds, pool: WorkPool) -> B:
    """The body of a request.

    Raises:
        BadRequest: it is not what `kind` says. BodyTooLarge: see `Gatekeeper`.
    """
    body = await http.body()
    kind_of_body = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and not re.fullmatch(r"application/([\w.-]+\+)?json", kind_of_body):
        raise BadRequest("this must be a JSON object, sent with Content-Type: application/json")
    if len(body) <= INLINE:
        return parse(body, kind, bounds)
    return await pool.run(parse, body, kind, bounds)


def parse(body: bytes, kind: type[B], bounds: Bounds) -> B:
    """Raises BadRequest."""
    if not body:
        raise BadRequest("the body is empty; send a JSON object")
    try:
        return kind.model_validate(_json(body), context=bounds)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)[0]) from None


def _json(body: bytes) -> Any:
    try:
        return read_json(body, "the body")
    except TooDeep as error:
        raise BadRequest(str(error), code="invalid_json") from None
    except ValueError as error:  # also of bytes that are no text, and of integers with thousands of digits
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
