"""Edges between an attention rank (A) and an FFN rank (F): rows that travel, each message behind a header.

One edge is one pair of ranks with a group of its own, so that a lost peer poisons nothing but its own edge. Messages of
an edge arrive in the order in which they were sent, and both ends run the same loop, so the receiver always knows which
message comes next; the header proves it.
"""

import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.parallel.afd.wire import PLAIN, Wire
from stepladder.parallel.mesh import gloo_group
from stepladder.parallel.residual import Pending

ABORT = 1  # flag: the sender gives this step up; no rows follow
INPUT = -1  # as block: x_0, what the streams of both sides begin with
DISCONNECT = 2  # a tag that no message has


class Header(NamedTuple):
    """What a message is. block: whose contribution, or INPUT; tokens: how many rows follow."""

    generation: int
    step: int
    block: int
    micro: int
    tokens: int
    flags: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, block {self.block}, micro-batch {self.micro} ({self.tokens} tokens)"


_LAYOUT = struct.Struct(f"{len(Header._fields)}q")
HEADER_BYTES = _LAYOUT.size


class EdgeLost(RuntimeError):
    """The peer is gone, silent for too long, gave up, or sent what was not expected; the error names the edge."""


class Later(NamedTuple):
    """A tensor on its way (`Pending`): `wait` waits for it."""

    wait: Callable[[], Any]


def first_line(error: Exception) -> str:
    """What an error says, without the stack that some libraries append."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class GlooPair:
    """One end of a gloo group of two: 0 on the A rank, 1 on the first or only F rank."""

    def __init__(self, store: dist.Store, end: int, host: str, timeout: timedelta) -> None:
        self._peer = 1 - end
        self._group = gloo_group(store, end, 2, host, timeout)

    def disconnect(self) -> None:
        """Give it up, from any thread: whoever waits for it gets EdgeLost, here and at a peer that lives.

        Gloo's abort interrupts nobody, but a wait that runs out fails whatever is pending and closes the sockets.
        """
        with suppress(RuntimeError):
            message = torch.empty(1, dtype=torch.uint8)
            self._group.recv([message], self._peer, DISCONNECT).wait(timedelta(milliseconds=1))


class GlooEdge(GlooPair):
    """An end of an edge between CPU ranks. A send blocks its peer's matching receive, never the loop.

    Args:
        store: shared by the two ends, with the prefix of the deployment's generation.
        name: of the edge, equal on both ends and unique in the store.
        end: 0 on the A rank, 1 on the F rank.
        host: the address of this machine that the other end can reach.
        deadline: how long a receive may take before the peer counts as lost.
        send_as, receive_as: the wire of each direction; the other end has them the other way round.

    Raises:
        ValueError: the other end has other wires.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        end: int,
        host: str = "127.0.0.1",
        deadline: timedelta = timedelta(seconds=30),
        send_as: Wire = PLAIN,
        receive_as: Wire = PLAIN,
    ) -> None:
        self.name = name
        self._last: Header | None = None  # that came, for the error that says what went wrong
        self._send_as, self._receive_as = send_as, receive_as
        store = dist.PrefixStore(f"edge {name}", store)
        store.set(f"wires {end}", f"{send_as.name}, {receive_as.name}")
        super().__init__(store, end, host, deadline)
        self._check_wires(store.get(f"wires {self._peer}").decode())
        self._sent: deque[tuple[Any, Tensor, Header]] = deque()

    def _check_wires(self, peers: str) -> None:
        """A message that is longer than its receive would end the process, and a shorter one be read as it is."""
        if peers != f"{self._receive_as.name}, {self._send_as.name}":
            raise ValueError(
                f"edge {self.name}: this end sends {self._send_as.name} and receives {self._receive_as.name}, but the "
                f"other sends and receives {peers}; give all ranks the same wires"
            )

    def send(self, header: Header, rows: Tensor) -> None:
        """Start sending `rows` [tokens, hidden]; they are copied and may be overwritten at once."""
        message = pack(header, rows, self._send_as)
        self._sent.append((_try(lambda: self._group.send([message], self._peer, 0)), message, header))

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        """Post the receive of the message with this header: [header.tokens, hidden] when it is waited for."""
        wire = self._receive_as
        message = torch.empty(HEADER_BYTES + wire.size(header.tokens, hidden, dtype), dtype=torch.uint8)
        work = _try(lambda: self._group.recv([message], self._peer, 0))

        def wait() -> Tensor:
            self._complete(work, header)
            self._check(header, header_of(message))
            return wire.read(message[HEADER_BYTES:], hidden, dtype)

        return Later(wait)

    def settle(self) -> None:
        """Wait until everything that was sent has been taken."""
        while self._sent:
            work, _, header = self._sent.popleft()  # a handle that is dropped unwaited loses its message
            self._complete(work, header)

    def abort(self) -> None:
        """Tell the peer that this step will not be completed."""
        last = self._last or Header(0, 0, INPUT, 0, 0)
        self.send(last._replace(flags=ABORT, tokens=0), torch.empty(0, 1))

    def _complete(self, work: Any, header: Header) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            why = f"nothing came for {header}; the last was {self._last}: {first_line(error)}"
            raise EdgeLost(f"edge {self.name}: {why}") from None

    def _check(self, expected: Header, got: Header) -> None:
        if got.flags & ABORT:
            raise EdgeLost(f"edge {self.name}: the peer gave up at {got}")
        if got != expected:
            raise EdgeLost(f"edge {self.name}: expected {expected} of generation {expected.generation}, got {got} of "
                           f"generation {got.generation}")  # fmt: skip
        self._last = got


def _try(start: Callable[[], Any]) -> Any:
    """The work that `start` begins; if the peer is gone already, one that says so when it is waited for."""
    try:
        return start()
    except RuntimeError as error:
        failed: Future = Future()
        failed.set_exception(error)
        return Later(failed.result)


def pack(header: Header, rows: Tensor, wire: Wire) -> Tensor:
    """Header and rows as one message of bytes."""
    message = torch.empty(HEADER_BYTES + wire.size(len(rows), rows.shape[1], rows.dtype), dtype=torch.uint8)
    _LAYOUT.pack_into(message.numpy().data, 0, *header)  # a tensor of six numbers takes three times as long
    wire.write(rows, message[HEADER_BYTES:])
    return message


def header_of(message: Tensor) -> Header:
    return Header(*_LAYOUT.unpack_from(message.numpy().data))
