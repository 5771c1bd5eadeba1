"""ZeroMQ sockets that only holders of the deployment's secret open; what they carry is encrypted."""

import hashlib
from types import SimpleNamespace
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

__all__ = ["CurveServer", "Keys", "authenticate"]


class Keys(NamedTuple):
    """A CURVE key pair, Z85."""

    public: bytes
    secret: bytes

    @staticmethod
    def of(role: str, deployment_secret: str) -> "Keys":
        """The key pair of a role, such as "engine" or "gateway", 16 letters at most; whoever knows the deployment's
        secret has all of them."""
        digest = hashlib.blake2b(deployment_secret.encode(), digest_size=32, person=role.encode()).digest()
        secret = z85.encode(digest)
        return Keys(zmq.curve_public(secret), secret)


class CurveServer:
    """A ROUTER that admits one role, with a context of its own.

    Args:
        host: the address to listen on; the port is free and chosen by the system.
        secret: the deployment's. role: of this end. admitted: of the others.
        queue: messages held per peer, either way. linger: milliseconds for what is unsent when it is closed.
        largest: bytes of a frame that comes in; a peer that sends more is cut off. -1: any.

    Attributes:
        address: "tcp://host:port".
    """

    def __init__(
        self, host: str, secret: str, *, role: str, admitted: str, queue: int, linger: int, largest: int = -1
    ) -> None:
        self.context, self._linger = zmq.Context(), linger
        known = Keys.of(admitted, secret).public
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        provider = SimpleNamespace(callback=lambda _, key: key == known)
        self._authenticator.configure_curve_callback(credentials_provider=provider)
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.set_hwm(queue)
        self.socket.setsockopt(zmq.LINGER, linger)
        self.socket.setsockopt(zmq.MAXMSGSIZE, largest)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a peer that is gone must fail, not vanish
        self.socket.curve_server = True
        self.socket.curve_publickey, self.socket.curve_secretkey = Keys.of(role, secret)
        self.address = f"tcp://{host}:{self.socket.bind_to_random_port(f'tcp://{host}')}"

    def close(self) -> None:
        self._authenticator.stop()
        self.context.destroy(linger=self._linger)


def authenticate(socket: zmq.Socket, secret: str, *, role: str, server: str) -> None:
    """Before it connects to the server of that role."""
    socket.curve_serverkey = Keys.of(server, secret).public
    socket.curve_publickey, socket.curve_secretkey = Keys.of(role, secret)
