"""A real HTTP server over a real engine, in this process, on a port that the system chose."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import uvicorn

from stepladder import LLM
from stepladder.cluster.gateway.api import build_app
from stepladder.cluster.gateway.http_limits import HttpLimits, http_config
from stepladder.cluster.gateway.listening import listen
from stepladder.cluster.gateway.openai_service import OpenAIService
from stepladder.cluster.gateway.service_config import ServiceConfig
from stepladder.workers.text.tokenizer import Tokenizer
from tests.cluster.local_backend import LocalBackend


@dataclass
class Server:
    url: str
    service: OpenAIService
    backend: LocalBackend
    loop: asyncio.AbstractEventLoop

    @property
    def running(self) -> int:
        scheduler = self.backend.engine.scheduler
        return len(scheduler.running) + len(scheduler.waiting)

    def client(self, **options: Any) -> Any:
        """An `openai.OpenAI`; untyped, since bodies here are plain dictionaries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_client(self) -> Any:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it in the server's event loop; a future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end with [DONE]."""
        with httpx.stream("POST", self.url + path, json={**body, "stream": True}, timeout=30) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def serve(path: Path, llm_options: dict[str, int] | None = None, **options: Any) -> Iterator[Server]:
    """Options of LocalBackend, HttpLimits or ServiceConfig, and `traces`."""
    engine = LLM(str(path), device="cpu", **(llm_options or {})).engine
    traces = options.pop("traces", None)
    backend_options = {k: options.pop(k) for k in ("max_in_flight", "tokens_per_output") if k in options}
    backend, tokenizer = LocalBackend(engine, **backend_options), Tokenizer(path)
    http_limits = HttpLimits(**{f.name: options.pop(f.name) for f in fields(HttpLimits) if f.name in options})
    limits = {"max_model_len": engine.config.max_model_len, "vocab_size": tokenizer.fast.get_vocab_size()}
    service = OpenAIService(
        backend, tokenizer, ServiceConfig(**{"model_name": "org/tiny", "version": "1", **limits, **options})
    )
    listening = listen("127.0.0.1")
    server = uvicorn.Server(http_config(build_app(service, traces), http_limits, lifespan="off"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[server.serve(sockets=[listening])])
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", service, backend, loop)
    finally:
        server.should_exit = True
        thread.join()
        loop.close()
        backend.close()


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not come true"
        time.sleep(0.005)


def strict(kind: type[pydantic.BaseModel], body: dict[str, Any], extra: tuple[str, ...] = ()) -> None:
    """`body` is exactly such an object of OpenAI's: required fields are there, types are right, nothing is added."""
    parsed = kind.model_validate(body, strict=True)
    pending: list[Any] = [parsed]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, pydantic.BaseModel):
            assert not set(value.model_extra or {}) - set(extra), f"unknown fields {value.model_extra}"
            pending.extend(getattr(value, name) for name in type(value).model_fields)
