"""The gateway's end of the wire: sends each request to an engine, and replays it elsewhere when that engine is lost.

A library inside each gateway, fed the table of engines by the controller. It implements `service.Backend`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from time import monotonic

import zmq
import zmq.asyncio

from cluster.errors import Overloaded, Unavailable
from workers.core import Output, Request
from workers.engine import EngineStats
from workers.messages import Abort, Hello, Keys, Refusal, Submit, Update, decode_update, encode


@dataclass(frozen=True)
class Endpoint:
    """An engine that takes requests. generation: which life of it; a restarted gang has a new one."""

    name: str
    generation: int
    address: str


@dataclass(eq=False)
class Flight:
    """A request under way. `sent` is what the client has; a replay continues behind it."""

    request: Request
    engine: "Link | None" = None
    attempt: int = 0
    sent: list[int] = field(default_factory=list)
    events: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)

    @property
    def wire_id(self) -> str:
        """A name per attempt, so that what an older attempt still says is not taken for this one's."""
        return f"{self.request.id}#{self.attempt}"

    @property
    def cost(self) -> int:
        """KV tokens it may come to hold."""
        return len(self.request.prompt) + self.request.params.max_tokens


class Link:
    """One engine, seen from one gateway."""

    def __init__(self, context: zmq.asyncio.Context, identity: str, secret: str, endpoint: Endpoint) -> None:
        self.endpoint, self.stats, self.last_heard = endpoint, EngineStats(), monotonic()
        self.alive = False
        self.flights: dict[str, Flight] = {}
        self._sent = self._heard = 0
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, f"{identity}-{endpoint.generation}".encode())
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.curve_serverkey = Keys.of("engine", secret).public
        self.socket.curve_publickey, self.socket.curve_secretkey = Keys.of("gateway", secret)
        self.socket.connect(endpoint.address)

    @property
    def load(self) -> int:
        return sum(flight.cost for flight in self.flights.values())

    async def hello(self) -> None:
        self._sent = self._heard = 0
        self.last_heard = monotonic()
        await self.socket.send(encode(Hello()))

    async def submit(self, flight: Flight) -> None:
        flight.engine = self
        flight.attempt += 1
        self.flights[flight.wire_id] = flight
        self._sent += 1
        request = replace(flight.request, id=flight.wire_id, output=(*flight.request.output, *flight.sent))
        await self.socket.send(encode(Submit(self._sent, request)))

    async def abort(self, flight: Flight) -> None:
        self.flights.pop(flight.wire_id, None)
        self._sent += 1
        await self.socket.send(encode(Abort(self._sent, flight.wire_id)))

    async def receive(self) -> bool:
        """Deliver one update to its flights; False if one before it was lost."""
        update = decode_update(await self.socket.recv())
        self.alive, self.last_heard, self.stats = True, monotonic(), update.stats
        if update.number != self._heard:
            return False
        self._heard += 1
        self._deliver(update)
        return True

    def _deliver(self, update: Update) -> None:
        for refusal in update.refusals:
            if flight := self.flights.pop(refusal.id, None):
                flight.events.put_nowait(_as_error(refusal))
        for output in update.outputs:
            if flight := self.flights.get(output.id):
                flight.sent.extend(output.tokens)
                flight.events.put_nowait(replace(output, id=flight.request.id))
                if output.finish_reason:
                    del self.flights[output.id]

    def close(self) -> None:
        self.socket.close()


class Router:
    """Least KV tokens first over the engines of the table.

    Args:
        identity: this gateway's name, unique among gateways.
        secret: the deployment's.
        patience: seconds that a request whose engine was lost waits for another one.
        silence: seconds without a word from an engine after which messages must have been lost. Longer than a step.
    """

    def __init__(self, identity: str, secret: str, patience: float = 120.0, silence: float = 30.0) -> None:
        self._identity, self._secret, self._patience, self._silence = identity, secret, patience, silence
        self._context = zmq.asyncio.Context()
        self._links: dict[Endpoint, Link] = {}
        self._tasks: dict[Endpoint, list[asyncio.Task[None]]] = {}
        self._changed = asyncio.Condition()
        self.replays = 0

    def ready(self) -> bool:
        return any(link.alive for link in self._links.values())

    @property
    def stats(self) -> list[EngineStats]:
        """The newest counters of every engine."""
        return [link.stats for link in self._links.values()]

    async def update(self, table: Iterable[Endpoint]) -> None:
        """Talk to exactly these engines from now on; requests of the others are replayed."""
        table = set(table)
        for endpoint in table - self._links.keys():
            link = Link(self._context, self._identity, self._secret, endpoint)
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
            await self._replay(link)

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
            await self._abandon(flight)

    async def close(self) -> None:
        await self.update([])
        self._context.destroy(linger=0)

    async def _submit(self, flight: Flight) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._links)), self._patience)
            except TimeoutError:
                raise Unavailable("the engine was lost and none has come back", retry_after=10) from None
        link = min(self._links.values(), key=lambda link: link.load)
        await link.submit(flight)

    async def _abandon(self, flight: Flight) -> None:
        link = flight.engine
        if link and link.flights.get(flight.wire_id) is flight and self._links.get(link.endpoint) is link:
            await link.abort(flight)

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
        flights = list(link.flights.values())
        link.flights.clear()
        for flight in flights:
            self.replays += 1
            try:
                await self._submit(flight)
            except Unavailable as error:
                flight.events.put_nowait(error)


def _as_error(refusal: Refusal) -> Exception:
    return Overloaded(refusal.message, retry_after=1) if refusal.full else ValueError(refusal.message)
