"""Edges between an attention rank (A) and an FFN rank (F): rows that travel, each message behind a header.

One edge is one pair of ranks with a group of its own, so that a lost peer poisons nothing but its own edge. Messages of
an edge arrive in the order in which they were sent, and both ends run the same loop, so the receiver always knows which
message comes next; the header proves it.
"""

import queue
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import gloo_group
from parallel.residual import Pending

ABORT = 1  # flag: the sender gives this step up; no rows follow
INPUT = -1  # as block: x_0, what the streams of both sides begin with


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


HEADER_BYTES = 8 * len(Header._fields)


class EdgeLost(RuntimeError):
    """The peer is gone, silent for too long, gave up, or sent what was not expected; the sentence names the edge."""


class Edge(Protocol):
    """One end of an edge; `GlooEdge` and `LoopbackEdge` are."""

    name: str

    def send(self, header: Header, rows: Tensor) -> None:
        """Start sending `rows` [tokens, hidden]; they are copied and may be overwritten at once."""
        ...

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        """Post the receive of the message with this header: [header.tokens, hidden] when it is waited for."""
        ...

    def settle(self) -> None:
        """Wait until everything that was sent has been taken."""
        ...

    def abort(self) -> None:
        """Tell the peer that this step will not be completed."""
        ...


@dataclass
class _Watch:
    """The last header that came, for the sentence about what went wrong."""

    name: str
    last: Header | None = None

    def check(self, expected: Header, got: Header) -> None:
        if got.flags & ABORT:
            raise EdgeLost(f"edge {self.name}: the peer gave up at {got}")
        if got != expected:
            raise EdgeLost(f"edge {self.name}: expected {expected} of generation {expected.generation}, got {got} of "
                           f"generation {got.generation}")  # fmt: skip
        self.last = got

    def lost(self, expected: Header, error: Exception) -> EdgeLost:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return EdgeLost(f"edge {self.name}: nothing came for {expected}; the last was {self.last}: {reason}")


class GlooEdge:
    """An end of an edge between CPU ranks. A send blocks its peer's matching receive, never the loop.

    Args:
        store: shared by the two ends, with the prefix of the deployment's generation.
        name: of the edge, equal on both ends and unique in the store.
        end: 0 on the A rank, 1 on the F rank.
        host: the address of this machine that the other end can reach.
        deadline: how long a receive may take before the peer counts as lost.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        end: int,
        host: str = "127.0.0.1",
        deadline: timedelta = timedelta(seconds=30),
    ) -> None:
        self.name, self._peer, self._watch = name, 1 - end, _Watch(name)
        self._group = gloo_group(dist.PrefixStore(f"edge {name}", store), end, 2, host, deadline)
        self._sent: deque[tuple[Any, Tensor, Header]] = deque()

    def send(self, header: Header, rows: Tensor) -> None:
        message = pack(header, rows)
        self._sent.append((self._group.send([message], self._peer, 0), message, header))

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        size = HEADER_BYTES + header.tokens * hidden * dtype.itemsize
        message = torch.empty(size, dtype=torch.uint8)
        return _Arriving(self._group.recv([message], self._peer, 0), message, header, (hidden, dtype), self._watch)

    def settle(self) -> None:
        while self._sent:
            work, _, header = self._sent.popleft()  # a handle that is dropped unwaited loses its message
            try:
                work.wait()
            except RuntimeError as error:
                raise self._watch.lost(header, error) from None

    def abort(self) -> None:
        last = self._watch.last or Header(0, 0, INPUT, 0, 0)
        self.send(last._replace(flags=ABORT, tokens=0), torch.empty(0, 1))


class _Arriving:
    def __init__(
        self, work: Any, message: Tensor, header: Header, shape: tuple[int, torch.dtype], watch: _Watch
    ) -> None:
        self.work, self._message, self._header, self._shape, self._watch = work, message, header, shape, watch

    def wait(self) -> Tensor:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self._watch.lost(self._header, error) from None
        self._watch.check(self._header, header_of(self._message))
        hidden, dtype = self._shape
        return self._message[HEADER_BYTES:].view(dtype).view(-1, hidden)


class LoopbackEdge:
    """An end of an edge inside one process, between threads: the reference for the others."""

    def __init__(self, name: str, inbox: queue.Queue, outbox: queue.Queue, deadline: float) -> None:
        self.name, self._inbox, self._outbox, self._deadline = name, inbox, outbox, deadline
        self._watch = _Watch(name)
        self._posted = self._come = 0
        self._boxes: dict[int, tuple[Header, Tensor]] = {}

    @staticmethod
    def pair(name: str, deadline: float = 30.0) -> tuple["LoopbackEdge", "LoopbackEdge"]:
        """The ends of A and of F."""
        one: queue.Queue = queue.Queue()
        other: queue.Queue = queue.Queue()
        return LoopbackEdge(name, one, other, deadline), LoopbackEdge(name, other, one, deadline)

    def send(self, header: Header, rows: Tensor) -> None:
        self._outbox.put((header, rows.clone()))

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        self._posted += 1
        return _Boxed(self, self._posted, header)

    def settle(self) -> None:
        pass

    def abort(self) -> None:
        last = self._watch.last or Header(0, 0, INPUT, 0, 0)
        self._outbox.put((last._replace(flags=ABORT, tokens=0), torch.empty(0)))

    def open(self, number: int, expected: Header) -> Tensor:
        """The rows of the message for the receive that was posted as the `number`-th."""
        try:
            while number not in self._boxes:
                self._boxes[self._come + 1] = self._inbox.get(timeout=self._deadline)
                self._come += 1
        except queue.Empty as error:
            raise self._watch.lost(expected, error) from None
        header, rows = self._boxes.pop(number)
        self._watch.check(expected, header)
        return rows


class _Boxed:
    """Messages go to the receives in the order in which these were posted, whatever is waited for first."""

    def __init__(self, edge: LoopbackEdge, number: int, header: Header) -> None:
        self._edge, self._number, self._header = edge, number, header

    def wait(self) -> Tensor:
        return self._edge.open(self._number, self._header)


def pack(header: Header, rows: Tensor) -> Tensor:
    """Header and rows as one message of bytes."""
    message = torch.empty(HEADER_BYTES + rows.numel() * rows.element_size(), dtype=torch.uint8)
    message[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(header))
    message[HEADER_BYTES:].view(rows.dtype).view(rows.shape).copy_(rows)
    return message


def header_of(message: Tensor) -> Header:
    return Header(*message[:HEADER_BYTES].view(torch.int64).tolist())
