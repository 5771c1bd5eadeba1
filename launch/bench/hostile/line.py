"""A raw connection to the server under attack, and what came back over it."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic

KEPT = 4 << 20  # bytes of what a server says that are kept
PIECE = 1 << 16
_STATUS = re.compile(rb'(?<!["\w ])HTTP/1\.1 (\d{3}) [A-Z]')  # not within a text, but right behind another answer
_ERROR = re.compile(rb'^data: (\{"error":.*)$', re.MULTILINE)


@dataclass
class Line:
    """received: what came, its first `KEPT` bytes. closed: the server closed the connection."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    closed: bool = False

    async def send(self, data: bytes) -> bool:
        """Whether the server took it all; it may stop reading, or close."""
        try:
            await asyncio.get_running_loop().sock_sendall(self.socket, data)
            return True
        except OSError:
            return False

    async def read(self, seconds: float, most: int = KEPT) -> None:
        """Until the server closes, `most` bytes came, or the time is over."""
        until, loop = monotonic() + seconds, asyncio.get_running_loop()
        count = 0
        try:
            while count < most and not self.closed:
                data = await asyncio.wait_for(loop.sock_recv(self.socket, PIECE), until - monotonic())
                self.closed, count = not data, count + len(data)
                self.received += data[: KEPT - len(self.received)]
        except TimeoutError:
            pass
        except OSError:
            self.closed = True

    def hang_up(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """With a reset instead of a farewell."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.socket.close()


@dataclass(frozen=True)
class Door:
    """Where the server listens."""

    host: str
    port: int

    @asynccontextmanager
    async def open(self, receive_buffer: int | None = None) -> AsyncIterator[Line]:
        """Raises OSError: the server does not take the connection."""
        with socket.socket() as client:
            client.setblocking(False)
            if receive_buffer:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(client, (self.host, self.port)), 30)
            yield Line(client)


def statuses(received: bytes) -> list[int]:
    """Of all answers in it; a stream that ended in an error of the server's own adds 500, unless the error has a code:
    the server is unavailable, or the time given to the request is over."""
    found = [int(status) for status in _STATUS.findall(received)]
    return found + [500 for event in _ERROR.findall(received) if _is_internal(event)]


def _is_internal(event: bytes) -> bool:
    try:
        error = json.loads(event)["error"]
    except ValueError:  # cut off
        return False
    return error["type"] == "server_error" and error["code"] is None
