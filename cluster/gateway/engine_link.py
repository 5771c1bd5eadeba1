"""One engine, seen from one gateway: the other end of `workers/server/channel.py`, and the requests under way there."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic

import msgspec
import zmq
import zmq.asyncio

from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.gateway.errors import BadRequest, Overloaded
from stepladder.workers.core import Output, Request
from stepladder.workers.curve import authenticate
from stepladder.workers.engine import EngineStats
from stepladder.workers.server.messages import (
    Abort,
    Hello,
    Submit,
    Update,
    decode_update,
    encode,
)
from stepladder.workers.silence import Silence

TICK = 1.0  # seconds; how often somebody looks whether engines are silent

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Flight:
    """A request under way. `sent` is what the client has; a replay continues behind it.

    Attributes:
        until: when its client will be gone (`time.monotonic`), if anybody knows.
        attempt: how often it was sent to an engine. lost: how many of its last attempts were lost without a token.
    """

    request: Request
    until: float | None = None
    link: "EngineLink | None" = None
    attempt: int = 0
    lost: int = 0
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


class EngineLink:
    """The connection to one engine.

    Sends never block: a queue that is full means an engine that is gone, and its requests are replayed elsewhere.
    """

    def __init__(self, context: zmq.asyncio.Context, gateway: str, secret: str, endpoint: Endpoint) -> None:
        self.endpoint, self.stats, self.silence = endpoint, EngineStats(), Silence(TICK)
        self.begun = monotonic()
        self.alive = False
        self.flights: dict[str, Flight] = {}
        self.orphans: set[str] = set()  # names of requests that lost their gateway and run on there
        self.load = 0  # KV tokens that its flights may come to hold
        self._sent = self._heard = self._session = 0
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, f"{gateway}-{endpoint.generation}".encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(10_000)
        authenticate(self._socket, secret, role="gateway", server="engine")
        self._socket.connect(endpoint.address)

    async def hello(self) -> None:
        """Begin anew: the engine forgets whatever this gateway had asked for."""
        self._sent, self._heard = -1, 0  # its own number is 0
        self._session += 1
        self.begun = monotonic()
        self.silence.broken()
        await self._send(encode(Hello(self._session)))

    async def submit(self, flight: Flight) -> None:
        """Raises BadRequest: it cannot be sent; nothing has been."""
        flight.attempt += 1
        output = (*flight.request.output, *flight.sent)
        request = replace(flight.request, id=flight.wire_id, output=output)
        patience = None if flight.until is None else flight.until - monotonic()
        try:
            message = encode(Submit(self._sent + 1, request, patience))
        except (OverflowError, TypeError, ValueError) as error:
            raise BadRequest(f"this request cannot be sent to an engine: {error}") from None
        flight.link, self.flights[flight.wire_id] = self, flight
        self.load += flight.cost
        await self._send(message)

    async def abort(self, flight: Flight) -> None:
        """Its client is gone; no error if it has ended already."""
        if self.forget(flight.wire_id):
            await self._send(encode(Abort(self._sent + 1, flight.wire_id)))

    def forget(self, wire_id: str) -> Flight | None:
        flight = self.flights.pop(wire_id, None)
        self.load -= flight.cost if flight else 0
        return flight

    async def receive(self) -> bool:
        """Deliver one update to its flights; False if one before it was lost, or this one cannot be read."""
        body = await self._socket.recv()
        try:
            update = decode_update(body)
        except msgspec.DecodeError as error:
            log.error("%s speaks another language: %s", self.endpoint.name, error)
            return False
        if update.session != self._session:
            return True  # sent before the engine heard that we had begun anew
        self.alive, self.stats = True, update.stats
        self.silence.broken()
        self.orphans = set(update.orphans)
        if update.number != self._heard:
            return False
        self._heard += 1
        self._deliver(update)
        return True

    def close(self) -> None:
        self._socket.close()

    def _deliver(self, update: Update) -> None:
        for refusal in update.refusals:
            if flight := self.forget(refusal.id):
                why, again = refusal.message, refusal.retry_after
                flight.events.put_nowait(Overloaded(why, retry_after=again) if refusal.full else BadRequest(why))
        for output in update.outputs:
            if flight := self.flights.get(output.id):
                flight.sent.extend(output.tokens)
                flight.lost = 0 if output.tokens else flight.lost
                if output.finish_reason:
                    self.forget(output.id)
                flight.events.put_nowait(replace(output, id=flight.request.id))

    async def _send(self, message: bytes) -> None:
        """The next message of the session, which is counted even if the queue is full: what is lost must be missed."""
        self._sent += 1
        with suppress(zmq.Again):
            await self._socket.send(message, zmq.NOBLOCK)
