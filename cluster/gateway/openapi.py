"""What /openapi.json says beyond what FastAPI sees: bodies that we read ourselves, every status, every content type."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from stepladder.cluster.gateway.strict_json import Body

ERRORS = {
    400: "The request is not what this endpoint takes.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait; Retry-After says when to come again.",
    503: "No engine is ready, this server is draining, or the time given to the request is over.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(app: FastAPI, bodies: Mapping[str, type[Body]], streams: set[str], texts: Mapping[str, str]) -> None:
    """Have the app describe itself.

    Args:
        bodies: path -> what it is sent. streams: paths that can answer in server-sent events. texts: path -> content
            type of an answer that is no JSON.
    """

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            reference = "#/components/schemas/{model}"
            kinds = [(kind, "validation") for kind in dict.fromkeys(bodies.values())]
            _, shared = models_json_schema(kinds, ref_template=reference)  # type: ignore[arg-type]
            found["components"] = {"schemas": {**shared.get("$defs", {}), "Error": _ERROR}}
            for path, methods in found["paths"].items():
                for operation in methods.values():
                    _complete(operation, path, bodies.get(path), path in streams, texts.get(path))
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], path: str, body: type[Body] | None, streams: bool, text: str | None) -> None:
    answers = operation["responses"]
    answers.pop("422", None)  # FastAPI's own, which is never sent
    if body:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        operation["requestBody"] = {"required": True, "content": content}
    if streams:
        answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if text:
        answers["200"]["content"] = {text: {"schema": {"type": "string"}}}
    for status in _statuses(path, body is not None, streams):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        answers[str(status)] = {"description": ERRORS[status], "content": content}


def _statuses(path: str, has_body: bool, generates: bool) -> list[int]:
    if path in ("/health", "/metrics"):
        return []
    if path == "/ready":
        return [503]
    more = [413, 429] if has_body else []
    return [400, 401, 404, *more, *([503] if generates else [])]
