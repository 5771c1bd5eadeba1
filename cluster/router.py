"""Sends each request to an engine, and replays it on another when that engine is lost.

A library inside each gateway, fed the table of engines by the controller. It implements `service.Backend`.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from time import monotonic
from typing import Any

import zmq.asyncio

from cluster.affinity import PrefixMemory
from cluster.errors import Unavailable
from cluster.wire import Endpoint, Flight, Link
from workers.core import Output, Request
from workers.engine import EngineStats

WORTH = 8  # a busier engine is preferred while it has at most this many more KV tokens per prompt token that it saves


class Router:
    """Prefix affinity first, then the fewest KV tokens, over the engines of the table.

    Args:
        gateway: this gateway's name, unique among gateways.
        secret: the deployment's.
        patience: seconds that a request whose engine was lost waits for another one.
        silence: seconds without a word from an engine after which messages must have been lost. Longer than a step.
    """

    def __init__(self, gateway: str, secret: str, patience: float = 120.0, silence: float = 30.0) -> None:
        self._gateway, self._secret, self._patience, self._silence = gateway, secret, patience, silence
        self._context = zmq.asyncio.Context()
        self._links: dict[Endpoint, Link] = {}
        self._tasks: dict[Endpoint, list[asyncio.Task[None]]] = {}
        self._changed = asyncio.Condition()
        self._background: set[asyncio.Task[None]] = set()
        self._prefixes = PrefixMemory()
        self.replays = 0

    def ready(self) -> bool:
        return any(link.alive for link in self._links.values())

    @property
    def stats(self) -> dict[str, EngineStats]:
        """The newest counters of every engine, by its name."""
        return {link.endpoint.name: link.stats for link in self._links.values()}

    async def update(self, table: Iterable[Endpoint]) -> None:
        """Talk to exactly these engines from now on; requests of the others are replayed."""
        table = set(table)
        for endpoint in table - self._links.keys():
            link = Link(self._context, self._gateway, self._secret, endpoint)
            self._links[endpoint] = link
            await link.hello()
            self._tasks[endpoint] = [asyncio.create_task(self._read(link)), asyncio.create_task(self._watch(link))]
        lost = [self._links.pop(endpoint) for endpoint in self._links.keys() - table]
        for link in lost:
            for task in self._tasks.pop(link.endpoint):
                task.cancel()
            link.close()
        async with self._changed:
            self._changed.notify_all()
        for link in lost:
            self._in_background(self._replay(link))

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """The outputs of `request`, across replays, until one has a finish reason. Closing it aborts the request.

        Raises:
            Unavailable: there is no engine; Overloaded: its queue is full; ValueError: it can never be served.
        """
        if not self.ready():
            raise Unavailable("no engine is ready", retry_after=2)
        flight = Flight(request)
        try:
            await self._submit(flight)
            while True:
                event = await flight.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            if flight.link and self._links.get(flight.link.endpoint) is flight.link:
                await flight.link.abort(flight)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Replays may have to wait for an engine; whoever brings the news of one must not."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        await self.update([])
        self._context.destroy(linger=0)

    async def _submit(self, flight: Flight) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._links)), self._patience)
            except TimeoutError:
                raise Unavailable("the engine was lost and none has come back", retry_after=10) from None
        link = self._choose(flight.request)
        self._prefixes.remember(flight.request.prompt, link.endpoint)
        await link.submit(flight)

    def _choose(self, request: Request) -> Link:
        """The engine where this request is under way already; else the one that has cached the longest beginning of
        the prompt, unless it is busier by more than that saves; else the idlest."""
        if home := next((link for link in self._links.values() if request.id in link.orphans), None):
            return home
        idlest = min(self._links.values(), key=lambda link: link.load)
        known, saved = self._prefixes.engine(request.prompt, set(self._links))
        near = self._links.get(known) if isinstance(known, Endpoint) else None
        return near if near and near.load - idlest.load <= WORTH * saved else idlest

    async def _read(self, link: Link) -> None:
        """Deliver updates until cancelled; after a gap in their numbers, start anew with everything replayed."""
        while True:
            if not await link.receive():
                await link.hello()
                await self._replay(link)

    async def _watch(self, link: Link) -> None:
        """Start anew with an engine that has been silent for too long, until cancelled."""
        while True:
            await asyncio.sleep(self._silence / 4)
            if monotonic() - link.last_heard > self._silence:
                await link.hello()
                await self._replay(link)

    async def _replay(self, link: Link) -> None:
        for wire_id in list(link.flights):
            if flight := link.forget(wire_id):
                self.replays += 1
                try:
                    await self._submit(flight)
                except Unavailable as error:
                    flight.events.put_nowait(error)
