"""An edge inside one process, between threads: the reference for the edges between ranks."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stepladder.parallel.afd.edges import ABORT, INPUT, EdgeLost, Header, first_line
from stepladder.parallel.afd.wire import PLAIN, Wire
from stepladder.parallel.residual import Pending


@dataclass
class Watch:
    """The last header that came, for the error that says what went wrong."""

    name: str
    last: Header | None = None

    def check(self, expected: Header, got: Header) -> None:
        if got.flags & ABORT:
            raise EdgeLost(f"edge {self.name}: the peer gave up at {got}")
        if got != expected:
            raise EdgeLost(f"edge {self.name}: expected {expected}, got {got}")
        self.last = got

    def lost(self, expected: Header, error: Exception) -> EdgeLost:
        return EdgeLost(f"edge {self.name}: nothing came for {expected}; the last was {self.last}: {first_line(error)}")


class LoopbackEdge:
    """One end, in place of a `GlooEdge`."""

    def __init__(
        self,
        name: str,
        inbox: queue.Queue,
        outbox: queue.Queue,
        deadline: float,
        send_as: Wire = PLAIN,
        receive_as: Wire = PLAIN,
    ) -> None:
        self.name, self._inbox, self._outbox, self._deadline = name, inbox, outbox, deadline
        self._send_as, self._receive_as = send_as, receive_as
        self._watch = Watch(name)
        self._posted = self._come = 0
        self._boxes: dict[int, tuple[Header, Tensor]] = {}

    @staticmethod
    def pair(
        name: str, deadline: float = 30.0, send_as: Wire = PLAIN, receive_as: Wire = PLAIN
    ) -> tuple["LoopbackEdge", "LoopbackEdge"]:
        """The ends of A, which sends and receives so, and of F, which does the reverse."""
        one: queue.Queue = queue.Queue()
        other: queue.Queue = queue.Queue()
        return (
            LoopbackEdge(name, one, other, deadline, send_as, receive_as),
            LoopbackEdge(name, other, one, deadline, receive_as, send_as),
        )

    def send(self, header: Header, rows: Tensor) -> None:
        size = self._send_as.size(len(rows), rows.shape[1], rows.dtype)
        body = torch.empty(size, dtype=torch.uint8, device=rows.device)
        self._send_as.write(rows, body)
        self._outbox.put((header, body))

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        self._posted += 1
        return _Boxed(self, self._posted, header, partial(self._receive_as.read, hidden=hidden, dtype=dtype))

    def settle(self) -> None:
        pass

    def abort(self) -> None:
        last = self._watch.last or Header(0, 0, INPUT, 0, 0)
        self._outbox.put((last._replace(flags=ABORT, tokens=0), torch.empty(0)))

    def open(self, number: int, expected: Header) -> Tensor:
        """The body of the message for the receive that was posted as the `number`-th."""
        try:
            while number not in self._boxes:
                message = self._inbox.get(timeout=self._deadline)
                if message[0].flags & ABORT:
                    self._inbox.put(message)  # for whoever waits next; nothing follows it
                    self._watch.check(expected, message[0])
                self._come += 1
                self._boxes[self._come] = message
        except queue.Empty as error:
            raise self._watch.lost(expected, error) from None
        header, body = self._boxes.pop(number)
        self._watch.check(expected, header)
        return body


class _Boxed:
    """Messages go to the receives in the order in which these were posted, whatever is waited for first."""

    def __init__(self, edge: LoopbackEdge, number: int, header: Header, read: Callable[[Tensor], Tensor]) -> None:
        self._edge, self._number, self._header, self._read = edge, number, header, read

    def wait(self) -> Tensor:
        return self._read(self._edge.open(self._number, self._header))
