"""A backend without Ray or sockets: a real engine of this process, stepped by a thread."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from stepladder.cluster.gateway.errors import Overloaded, Unavailable
from stepladder.workers.core import Output, Request
from stepladder.workers.engine import Engine

Event = Output | Exception


class LocalBackend:
    """One engine.

    Args:
        max_in_flight: more requests than this are refused.
        tokens_per_output: outputs are held back until they have this many tokens, as speculation brings them.
    """

    def __init__(self, engine: Engine, max_in_flight: int = 256, tokens_per_output: int = 1) -> None:
        self.engine, self._max_in_flight, self._tokens_per_output = engine, max_in_flight, tokens_per_output
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._deliver: dict[str, Callable[[Event], object]] = {}
        self._held: dict[str, Output] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return self._thread.is_alive()

    @property
    def max_model_len(self) -> int:
        return self.engine.config.max_model_len

    async def generate(self, request: Request, until: float | None = None) -> AsyncIterator[Output]:
        if not self.ready():
            raise Unavailable("the engine is gone", retry_after=2)
        if len(self._deliver) >= self._max_in_flight:
            raise Overloaded("the queue is full", retry_after=0.01)
        assert request.id not in self._deliver, "two requests with one id"
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._deliver[request.id] = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
        self._todo.put(lambda: self.engine.add(request))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            del self._deliver[request.id]
            self._todo.put(lambda: self._forget(request.id))

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take():
                if self.engine.has_work:
                    for output in self.engine.step():
                        self._give(output)
        except Exception:
            for deliver in list(self._deliver.values()):
                deliver(Unavailable("the engine has failed", retry_after=2))

    def _take(self) -> bool:
        """Do what was asked for between steps; wait for something if there is no work. False at the end."""
        while not self._todo.empty() or not self.engine.has_work:
            task = self._todo.get()
            if task is None:
                return False
            task()
        return True

    def _forget(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._held.pop(request_id, None)

    def _give(self, output: Output) -> None:
        if held := self._held.pop(output.id, None):
            logprobs = None if output.logprobs is None else [*(held.logprobs or ()), *output.logprobs]
            tokens = held.tokens + output.tokens
            output = replace(held, tokens=tokens, logprobs=logprobs, finish_reason=output.finish_reason)
        if output.finish_reason is None and len(output.tokens) < self._tokens_per_output:
            self._held[output.id] = output
        elif deliver := self._deliver.get(output.id):
            deliver(output)
