"""Sends each request to an engine, and replays it on another when that engine is lost.

A library inside each gateway, fed the table of engines by the controller.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from time import monotonic

import zmq.asyncio

from stepladder.cluster.config import Deployment
from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.gateway.affinity import PrefixMemory
from stepladder.cluster.gateway.engine_link import TICK, EngineLink, Flight
from stepladder.cluster.gateway.errors import BadRequest, Unavailable
from stepladder.workers.core import Output, Request
from stepladder.workers.engine import EngineStats

log = logging.getLogger(__name__)

WORTH = 8  # a busier engine is preferred while it has at most this many more KV tokens per prompt token that it saves
MAX_LOST = 3  # engines in a row that a request loses without a token; it may be what ends them
FIRST_WORD_SECONDS = 1.0  # an engine that is new in the table has this long to say whose orphans it has


class Router:
    """Prefix affinity first, then the fewest KV tokens, over the engines of the table.

    Args:
        gateway: this gateway's name, unique among gateways.
        secret: the deployment's.
        patience: seconds that requests whose engine was lost wait for another one.
        silence: seconds without a word from an engine after which messages must have been lost. Longer than a step.
    """

    def __init__(self, gateway: str, secret: str, patience: float, silence: float) -> None:
        self._gateway, self._secret, self._patience, self._silence = gateway, secret, patience, silence
        self._context = zmq.asyncio.Context()
        self._links: dict[Endpoint, EngineLink] = {}
        self._readers: dict[Endpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()  # the table, or who in it has been heard
        self._wanted: set[Flight] = set()  # those whose clients are there
        self._watching: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._prefixes = PrefixMemory()
        self.replays = 0

    @classmethod
    def of(cls, gateway: str, deployment: Deployment) -> "Router":
        """A deployment's: an engine that is lost must first be missed, and then started again."""
        cluster = deployment.cluster
        patience = cluster.ping_seconds + cluster.hang_seconds + cluster.start_seconds
        return cls(gateway, deployment.secret, patience, silence=3 * cluster.hang_seconds)

    def ready(self) -> bool:
        """Whether a request sent now would find an engine."""
        return any(link.alive for link in self._links.values())

    @property
    def stats(self) -> dict[str, EngineStats]:
        """The newest counters of every engine, by its name."""
        return {link.endpoint.name: link.stats for link in self._links.values()}

    @property
    def max_model_len(self) -> int | None:
        """Prompt and output together that every engine takes, of those that have been heard; None of none."""
        return min((stats.max_model_len for stats in self.stats.values() if stats.max_model_len), default=None)

    async def update(self, table: Iterable[Endpoint]) -> None:
        """Talk to exactly these engines from now on; requests of the others are replayed."""
        self._watching = self._watching or asyncio.create_task(self._watch())
        table = set(table)
        for endpoint in table - self._links.keys():
            link = EngineLink(self._context, self._gateway, self._secret, endpoint)
            self._links[endpoint] = link
            await link.hello()
            self._readers[endpoint] = asyncio.create_task(self._read(link))
        lost = [self._links.pop(endpoint) for endpoint in self._links.keys() - table]
        for link in lost:
            self._readers.pop(link.endpoint).cancel()
            link.close()
        self._replay([flight for link in lost for flight in _take_back(link)])
        await self._notify()

    async def generate(self, request: Request, until: float | None = None) -> AsyncGenerator[Output, None]:
        """The outputs of `request`, across replays, until one has a finish reason. Closing it aborts the request.

        Args:
            until: when its client will be gone (`time.monotonic`), if anybody knows.

        Raises:
            Unavailable: there is no engine, or MAX_LOST were lost with it; Overloaded: its queue is full; BadRequest:
                it can never be served.
        """
        if not self.ready():
            raise Unavailable("no engine is ready", retry_after=2)
        flight = Flight(request, until)
        self._wanted.add(flight)
        try:
            await self._hear_everyone()
            await self._submit(flight, monotonic() + self._patience)
            while True:
                event = await flight.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            self._wanted.discard(flight)
            if flight.link and self._links.get(flight.link.endpoint) is flight.link:
                await flight.link.abort(flight)

    async def close(self) -> None:
        await self.update([])
        if self._watching:
            self._watching.cancel()
        self._context.destroy(linger=0)

    async def _hear_everyone(self) -> None:
        """A retry belongs where its request is under way already; so wait shortly for engines that may yet say so."""
        silent = [link.begun for link in self._links.values() if not link.alive]
        seconds = max(silent) + FIRST_WORD_SECONDS - monotonic() if silent else 0.0
        if seconds > 0:
            async with self._changed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._changed.wait_for(lambda: all(link.alive for link in self._links.values()))

    async def _submit(self, flight: Flight, until: float) -> None:
        """To the engine that suits it best. There may be none yet; Unavailable if there is none until `until`."""
        async with self._changed:
            try:
                async with asyncio.timeout(until - monotonic()):
                    await self._changed.wait_for(lambda: bool(self._links))
            except TimeoutError:
                sentence = f"the engine was lost and none has come back within {self._patience:g} s"
                raise Unavailable(sentence, retry_after=10) from None
        if flight in self._wanted:  # its client may have left meanwhile
            link = self._choose(flight.request)
            self._prefixes.remember(flight.request.prompt, link.endpoint)
            await link.submit(flight)

    def _choose(self, request: Request) -> EngineLink:
        """The engine where this request is under way already; else the one that has cached the longest beginning of
        the prompt, unless it is busier by more than that saves; else the idlest of those that have been heard."""
        if home := next((link for link in self._links.values() if request.id in link.orphans), None):
            return home
        heard = [link for link in self._links.values() if link.alive] or list(self._links.values())
        idlest = min(heard, key=lambda link: link.load)
        known, saved = self._prefixes.engine(request.prompt, set(self._links))
        near = self._links.get(known) if isinstance(known, Endpoint) else None
        return near if near and near.load - idlest.load <= WORTH * saved else idlest

    async def _read(self, link: EngineLink) -> None:
        """Deliver updates until cancelled; after a gap in their numbers, start anew."""
        while True:
            was_alive = link.alive
            is_whole = await link.receive()
            if link.alive and not was_alive:
                await self._notify()
            if not is_whole:
                await self._begin_anew(link)

    async def _watch(self) -> None:
        """Start anew with engines that have been silent for too long."""
        while True:
            await asyncio.sleep(TICK)
            for link in [link for link in self._links.values() if link.silence.seconds > self._silence]:
                await self._begin_anew(link)

    async def _begin_anew(self, link: EngineLink) -> None:
        """Messages were lost; everything under way there is replayed."""
        flights = _take_back(link)
        await link.hello()
        self._replay(flights)

    def _replay(self, flights: list[Flight]) -> None:
        """In the background: it may have to wait for an engine, and whoever brings the news of one must not."""
        flights = [flight for flight in flights if not _is_given_up(flight)]
        self.replays += len(flights)
        task = asyncio.create_task(self._submit_all(flights, monotonic() + self._patience))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _submit_all(self, flights: list[Flight], until: float) -> None:
        for flight in flights:
            try:
                await self._submit(flight, until)
            except (BadRequest, Unavailable) as error:
                flight.events.put_nowait(error)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _take_back(link: EngineLink) -> list[Flight]:
    """What was under way there, which the link then forgets."""
    return [flight for wire_id in list(link.flights) if (flight := link.forget(wire_id))]


def _is_given_up(flight: Flight) -> bool:
    """One more engine was lost with it."""
    flight.lost += 1
    if flight.lost < MAX_LOST:
        return False
    log.error("%d engines in a row were lost with request %s; it is given up", flight.lost, flight.request.id)
    sentence = f"{flight.lost} engines in a row were lost while they worked on this request; it is given up"
    flight.events.put_nowait(Unavailable(sentence))
    return True
