"""Rank 0's loop: take requests from gateways, step the engine, send each gateway its outputs."""

from collections import defaultdict
from collections.abc import Callable
from time import monotonic

from workers.channel import Channel
from workers.core import Output, Request
from workers.engine import Engine
from workers.messages import Abort, Hello, Refusal, Submit


class EngineService:
    """An engine behind a channel.

    Args:
        idle_seconds: how often an idle engine gives a sign of life, to its followers and to the gateways.
        max_queued_tokens: prompt tokens that may wait; beyond that, requests are refused as "full".
    """

    def __init__(
        self, engine: Engine, channel: Channel, max_queued_tokens: int = 1 << 20, idle_seconds: float = 1.0
    ) -> None:
        self._engine, self._channel = engine, channel
        self._max_queued_tokens, self._idle_seconds = max_queued_tokens, idle_seconds
        self._owners: dict[str, bytes] = {}
        self._last_sign = 0.0
        self._refusals: defaultdict[bytes, list[Refusal]] = defaultdict(list)

    def run(self, stopping: Callable[[], bool]) -> None:
        """Until `stopping`."""
        while not stopping():
            self._take(timeout=0.0 if self._engine.has_work else self._idle_seconds)
            if self._engine.has_work:
                self._give(self._engine.step())
            else:
                self._engine.heartbeat()
                self._give([])

    def _take(self, timeout: float) -> None:
        for gateway, message in self._channel.receive(timeout):
            match message:
                case Hello():
                    self._forget(gateway)
                case Submit(request=request):
                    self._submit(gateway, request)
                case Abort(id=request_id):
                    self._owners.pop(request_id, None)
                    self._engine.abort(request_id)

    def _submit(self, gateway: bytes, request: Request) -> None:
        try:
            if self._engine.queued_tokens + len(request.prompt) > self._max_queued_tokens:
                self._refuse(gateway, request.id, "the queue is full", full=True)
                return
            self._engine.add(request)
            self._owners[request.id] = gateway
        except ValueError as error:
            self._refuse(gateway, request.id, str(error), full=False)

    def _refuse(self, gateway: bytes, request_id: str, why: str, full: bool) -> None:
        self._refusals[gateway].append(Refusal(request_id, why, full))

    def _give(self, outputs: list[Output]) -> None:
        """One message per gateway that has something to hear; now and then one to everyone as a sign of life."""
        mail: defaultdict[bytes, list[Output]] = defaultdict(list)
        for output in outputs:
            if owner := self._owners.get(output.id):
                mail[owner].append(output)
            if output.finish_reason:
                self._owners.pop(output.id, None)
        everyone = self._channel.gateways if monotonic() - self._last_sign >= self._idle_seconds else []
        if everyone:
            self._last_sign = monotonic()
        for gateway in {*mail, *self._refusals, *everyone}:
            if not self._channel.send(gateway, mail[gateway], self._refusals.pop(gateway, []), self._engine.stats):
                self._forget(gateway)
        self._refusals.clear()

    def _forget(self, gateway: bytes) -> None:
        """A gateway is gone: nobody will read what its requests produce."""
        for request_id in [i for i, owner in self._owners.items() if owner == gateway]:
            del self._owners[request_id]
            self._engine.abort(request_id)
