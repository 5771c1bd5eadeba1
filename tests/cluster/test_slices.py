"""No accepted or refused input holds the gateway's event loop up."""

import asyncio
import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from stepladder.cluster.gateway.errors import Overloaded
from stepladder.cluster.gateway.reading import body_bytes
from stepladder.cluster.gateway.work_pool import WorkPool
from stepladder.workers.actors import settle_memory
from tests.cluster.serving import Server, serve

pytestmark = pytest.mark.timeout(120)
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LIMIT = body_bytes(1024)


def filled(one: str, before: str, after: str, separator: str = ",") -> bytes:
    """As many of `one` as a body may hold."""
    count = (LIMIT - len(before) - len(after)) // (len(one) + len(separator))
    return (before + separator.join([one] * count) + after).encode()


HOSTILE: dict[str, tuple[str, bytes, int, str | None]] = {
    "messages without anything": (CHAT, filled("{}", '{"model":"org/tiny","messages":[', "]}"), 400, "messages"),
    "parts without anything": (
        CHAT,
        filled("{}", '{"model":"org/tiny","messages":[{"role":"user","content":[', "]}]}"),
        400,
        "messages[0].content",
    ),
    "unknown fields": (
        COMPLETION,
        json.dumps({"model": "org/tiny", "prompt": "a"} | {f"x{i}": i for i in range(17_000)}).encode(),
        400,
        "x0",
    ),
    "empty prompts": (COMPLETION, filled("[]", '{"model":"org/tiny","prompt":[', "]}"), 400, "prompt"),
    "token ids": (COMPLETION, filled("1", '{"model":"org/tiny","prompt":[', "]}"), 400, "prompt"),
    "token ids of prompts": (COMPLETION, filled("1", '{"model":"org/tiny","prompt":[[', "]]}"), 400, "prompt"),
    "biases": (
        COMPLETION,
        json.dumps({"model": "org/tiny", "prompt": "a", "logit_bias": {i: "x" for i in range(18_000)}}).encode(),
        400,
        "logit_bias",
    ),
    "stop tokens": (COMPLETION, filled('"a"', '{"prompt":"a","stop_token_ids":[', "]}"), 400, "stop_token_ids"),
    "stop strings": (COMPLETION, filled('"a"', '{"model":"org/tiny","prompt":"a","stop":[', "]}"), 400, "stop"),
    "one long word": (COMPLETION, filled("a", '{"model":"org/tiny","prompt":"', '"}', ""), 400, "prompt"),
    "tokenize": ("/tokenize", filled("a", '{"prompt":"', '"}', ""), 200, None),
    "detokenize": ("/detokenize", filled("65", '{"tokens":[', "]}"), 200, None),
    "detokenize nonsense": ("/detokenize", filled('"a"', '{"tokens":[', "]}"), 400, "tokens[0]"),
    "forged turns": (
        CHAT,
        filled("<|end|>", '{"model":"org/tiny","messages":[{"role":"user","content":"', '"}]}', ""),
        400,
        "messages",
    ),
    "forged template variables": (
        "/tokenize",
        filled("<|end|>", '{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"x":"', '"}}', ""),
        200,
        None,
    ),
    "tool calls without anything": (
        CHAT,
        filled("{}", '{"model":"org/tiny","messages":[{"role":"assistant","tool_calls":[', "]}]}"),
        400,
        "messages[0].tool_calls",
    ),
    "a deep nest": (CHAT, b"[" * LIMIT, 400, None),
}


@contextmanager
def settled() -> Iterator[None]:
    """This process has loaded all sorts of things that a gateway has not; see `settle_memory`."""
    settle_memory()
    yield
    gc.unfreeze()


@contextmanager
def beating(server: Server) -> Iterator[Callable[[], float]]:
    """The longest time between two turns of its event loop, and of this process's threads beside it, in seconds."""
    longest, over = [0.0], threading.Event()

    async def beat() -> None:
        last = monotonic()
        while not over.is_set():
            await asyncio.sleep(0.001)
            longest[0], last = max(longest[0], monotonic() - last), monotonic()

    beats = server.start(beat())
    yield lambda: longest[0]
    over.set()
    beats.result(10)


@pytest.mark.parametrize("name", HOSTILE)
def test_large_bodies(server: Server, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, body, status, param = HOSTILE[name]
    assert LIMIT // 2 < len(body) <= LIMIT
    with settled(), beating(server) as longest:
        answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == status, answer.text[:300]
    if status != 200:
        assert answer.json()["error"]["param"] == param and len(answer.content) < 1000
    with capsys.disabled():
        print(f"[{name}: longest slice {1000 * longest():.0f} ms]", end=" ")


def test_bodies_beyond_the_context_are_not_read(server: Server) -> None:
    answer = httpx.post(server.url + CHAT, content=b" " * (LIMIT + 1), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and str(LIMIT) in answer.json()["error"]["message"]


LONG = {"prompt": list(range(100)) * 10, "n": 128, "max_tokens": 1}
TALK = {"messages": [{"role": "user", "content": "a"}], "n": 128}


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (COMPLETION, {**LONG, "logprobs": 20, "echo": True}, "prompt_logprobs"),
        (COMPLETION, {**LONG, "prompt_logprobs": 20}, "prompt_logprobs"),
        (CHAT, {**TALK, "logprobs": True, "top_logprobs": 20}, "logprobs"),
    ],
)
def test_more_log_probabilities_than_anybody_reads(
    server: Server, path: str, change: dict[str, Any], param: str
) -> None:
    answer = server.post(path, {"model": "org/tiny", **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and "at most 131072 in one answer" in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_long_answers_are_written_in_slices(
    random_model: Path, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest that is accepted: 1,000 echoed tokens of six choices, with 20 likeliest each."""
    body = {
        "model": "org/tiny", "prompt": list(range(100)) * 10, "n": 6, "logprobs": 20, "echo": True, "max_tokens": 1,
        "stream": stream,
    }  # fmt: skip
    with serve(random_model) as server, settled(), beating(server) as longest:
        answer = httpx.post(server.url + COMPLETION, json=body, timeout=60)
    assert answer.status_code == 200 and len(answer.content) > 1_000_000
    with capsys.disabled():
        print(f"[longest slice {1000 * longest():.0f} ms]", end=" ")


def test_work_that_waits_is_bounded() -> None:
    async def scene() -> None:
        pool, go = WorkPool(threads=1, waiting=1), threading.Event()
        work = [asyncio.create_task(pool.run(go.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await pool.run(go.wait)
        go.set()
        await asyncio.gather(*work)
        assert await pool.run(go.wait)
        pool.close()

    asyncio.run(scene())
