"""Requests that no honest client sends, each made from a seed and its number alone, so that one can be sent again.

A forged request is a valid one with a few things wrong: a value, a field, the shape, the spelling, the size, the path.
"""

import gzip
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from stepladder.cluster.gateway.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from stepladder.cluster.gateway.strict_json import Body
from stepladder.launch.bench.hostile.strange import PLAUSIBLE, any_name, any_value

HONEST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "def f(x):", "max_tokens": 4},
    "/tokenize": {"prompt": "def f(x):"},
    "/detokenize": {"tokens": [65, 66, 67]},
}
KINDS: dict[str, type[Body]] = dict(
    zip(HONEST, (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest), strict=True)
)
PATHS = (
    "/", "/v1", "/v1/completions/", "/v1/completions?n=2", "//v1/completions", "/v1/../v1/completions", "/metrics",
    "/v1/models", "/v1/models/", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/a/../../b", "/v1/embeddings",
    "/health", "/ready", "/version", "/docs", "/openapi.json", "/tokenizer_info", "/%2e%2e/%2e%2e/etc/passwd",
    "/" + "a/" * 2000, "/\u00e9", "*", "http://elsewhere/v1/completions",
)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "get", "PRI")
HEADERS = (
    ("X-Request-Id", "a b"), ("X-Request-Id", "x" * 5000), ("X-Request-Id", "\u00e9"), ("X-Request-Id", ""),
    ("Authorization", "Bearer"), ("Authorization", "Bearer \u00ff"), ("Authorization", "Basic " + "A" * 9000),
    ("traceparent", "00-" + "f" * 32), ("traceparent", "\u00ff"), ("Accept-Encoding", "gzip;q=nan"), ("Accept", ""),
    ("Content-Encoding", "br"), ("Transfer-Encoding", "identity"), ("Expect", "100-continue"), ("Upgrade", "websocket"),
    ("Range", "bytes=5-1"), ("Cookie", "a=" + "b" * 30_000), ("Host", "a, b"), ("Origin", "null"), ("TE", "trailers"),
)  # fmt: skip
CONTENT_TYPES = (
    "", "text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "APPLICATION/JSON",
    "multipart/form-data; boundary=", "application/vnd.api+json", "\u00ff/\u00ff",
)  # fmt: skip
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp037", "utf-7")
BOMBS = {  # path -> the beginning, what is repeated, the end
    "/v1/chat/completions": [
        ('{"model":MODEL,"messages":[', "{},", "{}]}"),
        ('{"model":MODEL,"messages":[', '{"role":"user","content":"a"},', '{"role":"user","content":"a"}]}'),
        ('{"model":MODEL,"messages":[{"role":"user","content":[', '{"type":"text","text":"a"},', "{}]}]}"),
        ('{"model":MODEL,"messages":[{"role":"user","content":"', "\\u4e00", '"}]}'),
    ],
    "/v1/completions": [
        ('{"model":MODEL,"prompt":[', "[],", "[]]}"),
        ('{"model":MODEL,"prompt":[', "[1],", "[1]]}"),
        ('{"model":MODEL,"prompt":[', "1,", "1]}"),
        ('{"model":MODEL,"prompt":[', '"a",', '"a"]}'),
        ('{"model":MODEL,"prompt":"', "a", '"}'),
        ('{"model":MODEL,"prompt":"', "\\ud83d\\ude00", '"}'),
        ('{"model":MODEL,"prompt":"a","stop":[', '"a",', '"a"]}'),
        ('{"model":MODEL,"prompt":"a","logit_bias":{', '"1":1,', '"1":1}}'),
        ('{"model":MODEL,"prompt":"a","stop_token_ids":[', "1,", "1]}"),
        ('{"model":MODEL,"prompt":"a","seed":', "9", "}"),
    ],
    "/tokenize": [('{"prompt":"', "a ", '"}'), ('{"prompt":"', "\\u0000", '"}'), ('{"messages":[', "[],", "[]]}")],
    "/detokenize": [('{"tokens":[', "65,", "65]}"), ('{"tokens":[', "[", ""), ('{"tokens":[', '"a",', "1]}")],
}
BEYOND = (-1, 0, 1, 1000, 1 << 20)  # bytes above the limit of a body


@dataclass(frozen=True)
class Target:
    """What is attacked: the name of its model, and how many bytes of a body it reads."""

    model: str
    limit: int


class Forged(NamedTuple):
    """One HTTP request. what: is wrong with it, in a word."""

    what: str
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def raw(self) -> bytes:
        """As it is sent, on a connection of its own."""
        own = [("Host", "a"), ("Connection", "close"), ("Content-Length", str(len(self.body)))]
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in [*own, *self.headers])]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


def forge(seed: int, number: int, target: Target) -> Forged:
    """The request of that number, always the same."""
    rng = Random(f"{seed}/{number}")
    path = rng.choices(list(HONEST), [4, 4, 1, 1])[0]
    what = rng.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    return _KINDS[what][1](what, rng, path, target)


def _values(what: str, rng: Random, path: str, target: Target) -> Forged:
    """One to three values or fields that are not what they should be."""
    body = _honest(rng, path, target)
    for _ in range(rng.randint(1, 3)):
        rng.choice((_replace, _replace, _add, _add, _drop, _wrap, _repeat))(rng, path, body)
    return _json(what, path, _spelled(rng, body))


def _plausible(what: str, rng: Random, path: str, target: Target) -> Forged:
    """Nothing but fields that exist, with values that could be right: together they may be too much."""
    body = _honest(rng, path, target)
    for name in rng.sample(sorted(PLAUSIBLE), rng.randint(1, 8)):
        if name in KINDS[path].model_fields:
            body[name] = rng.choice(PLAUSIBLE[name])
    return _json(what, path, _spelled(rng, body))


def _spelling(what: str, rng: Random, path: str, target: Target) -> Forged:
    """A valid body, spelled as no JSON is."""
    text = json.dumps(_honest(rng, path, target))
    name = rng.choice(list(HONEST[path]))
    twice = f'{{"{name}":{json.dumps(any_value(rng), default=str)},{text[1:]}'
    flipped = bytearray(text.encode())
    for _ in range(rng.randint(1, 5)):
        flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return _json(
        what,
        path,
        rng.choice(
            [
                _deep(twice).encode("utf-8", "surrogatepass"),
                text[: rng.randrange(len(text))].encode(),
                bytes(flipped),
                text.encode(rng.choice(ENCODINGS)),
                text.encode() + rng.choice([b"}", text.encode(), b"\x00", b"//", b","]),
                text.replace('"', "'").encode(),
                text.replace(" ", rng.choice(["\u00a0", "\x0b", "\ufeff"])).encode(),
                gzip.compress(text.encode(), mtime=0),
                rng.randbytes(rng.randint(0, 200)),
                b" " * rng.randint(0, 50),
                text.replace(": ", ": -").encode(),
            ]
        ),
    )


def _bomb(what: str, rng: Random, path: str, target: Target) -> Forged:
    """A body just below, at or above what is read."""
    begin, one, end = rng.choice(BOMBS[path])
    begin, size = begin.replace("MODEL", json.dumps(target.model)), target.limit + rng.choice(BEYOND)
    repeated = one * max(0, (size - len(begin) - len(end)) // len(one))
    body = (begin + repeated + end).encode()
    return _json(what, path, b" " * (size - len(body)) + body)


def _route(what: str, rng: Random, path: str, target: Target) -> Forged:
    """Another path or method."""
    path = rng.choice((path, *PATHS, f"/{rng.getrandbits(64):x}"))
    body = json.dumps(_honest(rng, "/v1/completions", target)).encode() if rng.random() < 0.5 else b""
    return Forged(what, rng.choice(METHODS), path, [("Content-Type", "application/json")], body)


def _headers(what: str, rng: Random, path: str, target: Target) -> Forged:
    """A valid body under headers that are not."""
    headers = [("Content-Type", rng.choice(("application/json", *CONTENT_TYPES)))]
    headers += rng.sample(HEADERS, rng.randint(1, 3))
    return Forged(what, "POST", path, headers, json.dumps(_honest(rng, path, target)).encode())


_KINDS: dict[str, tuple[int, Callable[[str, Random, str, Target], Forged]]] = {
    "values": (50, _values),
    "plausible values": (12, _plausible),
    "spelling": (14, _spelling),
    "size": (10, _bomb),
    "routes": (7, _route),
    "headers": (7, _headers),
}
KINDS_OF_FORGERY = tuple(_KINDS)


def _honest(rng: Random, path: str, target: Target) -> dict[str, Any]:
    body = deepcopy(HONEST[path]) | {"model": target.model}
    return body | ({"stream": True} if path.startswith("/v1/") and rng.random() < 0.3 else {})


def _json(what: str, path: str, body: bytes) -> Forged:
    return Forged(what, "POST", path, [("Content-Type", "application/json")], body)


def _replace(rng: Random, path: str, body: dict[str, Any]) -> None:
    """A value anywhere in the tree."""
    places: list[tuple[Any, Any]] = []
    pending: list[Any] = [body]
    while pending:
        node = pending.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(min(len(node), 8))
            places += [(node, key) for key in keys]
            pending += [node[key] for key in keys]
    if places:
        node, key = rng.choice(places)
        node[key] = any_value(rng)


def _add(rng: Random, path: str, body: dict[str, Any]) -> None:
    """A field that exists, mostly."""
    known = [*KINDS[path].model_fields, *KINDS[path].NEUTRAL]
    body[rng.choice(known) if rng.random() < 0.9 else any_name(rng)] = any_value(rng)


def _drop(rng: Random, path: str, body: dict[str, Any]) -> None:
    body.pop(rng.choice(list(body) or [""]), None)


def _wrap(rng: Random, path: str, body: dict[str, Any]) -> None:
    if body:
        name = rng.choice(list(body))
        body[name] = rng.choice([[body[name]], {"a": body[name]}, [[body[name]]], json.dumps(body[name], default=str)])


def _repeat(rng: Random, path: str, body: dict[str, Any]) -> None:
    lists = [name for name, value in body.items() if isinstance(value, list | str)]
    if lists:
        name = rng.choice(lists)
        body[name] = body[name] * min(rng.choice([2, 10, 100, 1000]), 100_000 // max(len(body[name]), 1))


def _spelled(rng: Random, body: Any) -> bytes:
    return _deep(json.dumps(body, ensure_ascii=rng.random() < 0.5)).encode("utf-8", "surrogatepass")


def _deep(text: str) -> str:
    """Nests that no recursive writer writes; see `any_value`."""
    return re.sub(r'"<(list|object) (\d+)>"', lambda found: _nest(found[1], int(found[2])), text)


def _nest(kind: str, depth: int) -> str:
    opening, closing = ("[", "]") if kind == "list" else ('{"a":', "}")
    return opening * depth + "0" + closing * depth
