"""The engine's end of the wire to the gateways: a ZeroMQ ROUTER that admits only holders of the deployment's secret."""

from dataclasses import dataclass

import msgspec
import zmq

from stepladder.workers.core import Output
from stepladder.workers.curve import CurveServer
from stepladder.workers.engine import EngineStats
from stepladder.workers.server.messages import (
    Hello,
    Refusal,
    ToEngine,
    Unreadable,
    Update,
    decode_to_engine,
    encode,
)

QUEUE = 10_000  # messages held per gateway before it counts as gone


@dataclass
class _Session:
    """What a gateway is sent and what it has sent, since it began anew: the newest numbers either way."""

    number: int
    heard: int = 0
    sent: int = 0


class Channel:
    """Receives from any number of gateways, sends each what concerns it.

    Args:
        host: the address to listen on; the port is free and chosen by the system.
        secret: the deployment's.
    """

    def __init__(self, host: str, secret: str) -> None:
        self._server = CurveServer(host, secret, role="engine", admitted="gateway", queue=QUEUE, linger=1000)
        self._socket, self.address = self._server.socket, self._server.address
        self._gateways: dict[bytes, _Session] = {}

    @property
    def gateways(self) -> list[bytes]:
        return list(self._gateways)

    def receive(self, timeout: float) -> list[tuple[bytes, ToEngine | Unreadable]]:
        """Everything that has come, waiting at most `timeout` seconds for the first of it.

        A `Hello` means that whatever this gateway asked for before is void: it begins anew, or it skipped a number,
        so that messages were lost. In that case it is forgotten; it will notice the silence and say hello again.
        """
        messages: list[tuple[bytes, ToEngine | Unreadable]] = []
        patience = int(timeout * 1000)
        while self._socket.poll(patience):
            gateway, body = self._socket.recv_multipart()
            if message := self._accept(gateway, body):
                messages.append((gateway, message))
            patience = 0
        return messages

    def send(
        self,
        gateway: bytes,
        outputs: list[Output],
        refusals: list[Refusal],
        stats: EngineStats,
        orphans: list[str],
    ) -> bool:
        """One update; False if the gateway is gone."""
        session = self._gateways.get(gateway, _Session(0))
        body = encode(Update(session.number, session.sent, outputs, refusals, stats, orphans))
        try:
            self._socket.send_multipart([gateway, body], zmq.NOBLOCK)
        except zmq.ZMQError:
            self.forget(gateway)
            return False
        session.sent += 1
        return True

    def forget(self, gateway: bytes) -> None:
        self._gateways.pop(gateway, None)

    def close(self) -> None:
        self._server.close()

    def _accept(self, gateway: bytes, body: bytes) -> ToEngine | Unreadable | None:
        try:
            message = decode_to_engine(body)
        except msgspec.MsgspecError:
            return None  # it holds the secret but speaks another version: not ours to crash for
        session = self._gateways.get(gateway)
        if isinstance(message, Hello):
            self.forget(gateway)  # now it is the newest
            self._gateways[gateway] = _Session(message.session)
        elif session and session.heard == message.number - 1:
            session.heard = message.number
        else:
            self.forget(gateway)
            return Hello(session=0)
        return message
