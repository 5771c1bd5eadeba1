"""Rank 0's loop: take requests from gateways, step the engine, send each gateway its outputs."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from time import monotonic
from typing import NamedTuple

from stepladder.parallel.clock import Clock
from stepladder.workers.core import Output, Request
from stepladder.workers.engine import Engine
from stepladder.workers.server.channel import Channel
from stepladder.workers.server.messages import Abort, Hello, Refusal, Submit, Unreadable
from stepladder.workers.server.orphans import Orphans
from stepladder.workers.server.queue_limits import Queue, QueueLimits
from stepladder.workers.speculation.learning.busy_word import BusyWord


class _Client(NamedTuple):
    """Who asked for a request, and under which id."""

    gateway: bytes
    name: str


class EngineServer:
    """An engine behind a channel.

    Inside the engine a request has an id of its own, made from the gateway's: two gateways, or two lives of one, may
    ask under the same id.

    Args:
        limits: of what may wait for a place; beyond that, requests are refused as "full", unless they are replays,
            which have been accepted before.
        idle_seconds: how often an engine gives a sign of life, to its followers (when idle) and to the gateways.
        orphan_seconds: how long a request runs on whose gateway was lost.
        clock: of this rank.
        busy: told at once when there is work, so that training beside this engine makes way.
    """

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        limits: QueueLimits | None = None,
        idle_seconds: float = 1.0,
        orphan_seconds: float = 60.0,
        clock: Clock | None = None,
        busy: BusyWord | None = None,
    ) -> None:
        self._engine, self._channel, self._clock, self._busy = engine, channel, clock or Clock(), busy
        self._queue, self._idle_seconds = Queue(limits or QueueLimits()), idle_seconds
        self._clients: dict[str, _Client] = {}  # by the engine's request id
        self._mail: defaultdict[bytes, list[Output]] = defaultdict(list)
        self._refusals: defaultdict[bytes, list[Refusal]] = defaultdict(list)
        self._orphans = Orphans(orphan_seconds)
        self._numbers = count()
        self._last_sign = 0.0

    def run(self, stopping: Callable[[], bool]) -> None:
        """Until `stopping`."""
        while not stopping():
            if self._engine.has_work:
                self._take(timeout=0.0)
            else:
                with self._clock.idle:
                    self._take(timeout=self._idle_seconds)
            self._show()
            if self._engine.has_work:
                self._sort(self._step())
                self._show()
            self._give()
            if not self._engine.has_work:  # at once, so that nobody waits for this engine
                self._engine.heartbeat()

    def _show(self) -> None:
        if self._busy:
            scheduler, waiting = self._engine.scheduler, len(self._engine.scheduler.waiting)
            self._busy.set(len(scheduler.running) + waiting or self._engine.has_work, waiting)

    def _step(self) -> list[Output]:
        """One step, which says how fast they go if others wait for a place in it."""
        began, before, others = monotonic(), self._engine.stats.step_tokens, bool(self._engine.scheduler.waiting)
        outputs = self._engine.step()
        self._queue.pace.gave(outputs)
        if others and self._engine.scheduler.waiting:
            self._queue.pace.stepped(self._engine.stats.step_tokens - before, monotonic() - began)
        return outputs

    def sign(self) -> None:
        """In the middle of a step that takes long: tell the gateways that this engine is alive."""
        for gateway in self._channel.gateways:
            self._channel.send(gateway, [], [], self._engine.stats, self._orphans.names)

    def _take(self, timeout: float) -> None:
        messages = self._channel.receive(timeout)
        if messages:
            self._queue.look(self._engine.scheduler.waiting)
        for gateway, message in messages:
            match message:
                case Hello():
                    self._abort(gateway)
                    self._last_sign = 0.0  # it should hear at once who we are and whom we have
                case Submit():
                    self._submit(gateway, message)
                case Abort(id=name):
                    self._abort(gateway, name)
                case Unreadable(id=name, why=why):
                    self._refusals[gateway].append(Refusal(name, why, full=False))

    def _submit(self, gateway: bytes, message: Submit) -> None:
        request = message.request
        if self._adopt(gateway, request):
            return
        if not message.is_replay and (refusal := self._queue.refusal(request, message.patience)):
            self._refusals[gateway].append(refusal)
            return
        unique = f"{request.id}.{next(self._numbers)}"
        try:
            self._engine.add(replace(request, id=unique))
            self._clients[unique] = _Client(gateway, request.id)
            self._queue.accepted(request)
        except ValueError as error:
            self._refusals[gateway].append(Refusal(request.id, str(error), full=False))

    def _adopt(self, gateway: bytes, request: Request) -> bool:
        """Whether `request` is the retry of one that lost its gateway; then it goes on where that one is."""
        orphan = self._orphans.give_out(request)
        if orphan is None:
            return False
        self._mail[gateway].append(Output(request.id, orphan.tokens[len(request.output) :], orphan.finish_reason))
        if not orphan.finish_reason:
            self._clients[orphan.request.id] = _Client(gateway, request.id)
        return True

    def _sort(self, outputs: list[Output]) -> None:
        """A step's outputs into each gateway's mail."""
        for output in outputs:
            if client := self._clients.get(output.id):
                self._mail[client.gateway].append(replace(output, id=client.name))
            else:
                self._orphans.note(output)
            if output.finish_reason:
                self._clients.pop(output.id, None)

    def _give(self) -> None:
        """One message per gateway that has something to hear; now and then one to everyone as a sign of life.

        Those who have been here longest come first, so that a new one hears of all requests whose gateway is found
        to be gone.
        """
        everyone: list[bytes] = []
        if monotonic() - self._last_sign >= self._idle_seconds:
            self._last_sign, everyone = monotonic(), self._channel.gateways
            for request in self._orphans.expired():
                self._engine.abort(request.id)
        for gateway in dict.fromkeys([*everyone, *self._mail, *self._refusals]):
            mail, refusals = self._mail.pop(gateway, []), self._refusals.pop(gateway, [])
            if not self._channel.send(gateway, mail, refusals, self._engine.stats, self._orphans.names):
                self._orphan(gateway)

    def _orphan(self, gateway: bytes) -> None:
        """A gateway is gone. What it had asked for runs on for a while."""
        for request_id in self._requests_of(gateway):
            sequence = self._engine.find(request_id)
            if sequence and not sequence.request.params.wants_logprobs:  # the client would miss those of the past
                self._orphans.take_in(sequence.request, sequence.output)
            elif sequence:
                self._engine.abort(request_id)
            del self._clients[request_id]

    def _abort(self, gateway: bytes, name: str | None = None) -> None:
        """A client is gone, or, without a name, a gateway begins anew: what it had asked for before is void."""
        for request_id in self._requests_of(gateway, name):
            del self._clients[request_id]
            self._engine.abort(request_id)

    def _requests_of(self, gateway: bytes, name: str | None = None) -> list[str]:
        """The engine's ids of those that this gateway asked for: under this name, or all of them."""
        clients = self._clients.items()
        return [own_id for own_id, client in clients if client.gateway == gateway and name in (None, client.name)]
