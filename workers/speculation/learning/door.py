"""From the rings of engines to whoever learns: a door beside each engine, and one reader of several.

The reader asks, a door answers each question with one bounded message, and what nobody asks for stays in the ring.
"""

import logging
from collections import deque
from contextlib import suppress
from threading import Thread
from time import monotonic

import zmq

from stepladder.workers.curve import CurveServer, authenticate
from stepladder.workers.speculation.learning.lessons import Captured
from stepladder.workers.speculation.learning.ring import Ring
from stepladder.workers.speculation.learning.wire import Ask, decode_ask, encode, pack, unpack

__all__ = ["LessonDoor", "LessonReader"]

DOOR, READER = "lesson-door", "lesson-reader"  # roles
MESSAGE = 1 << 20  # bytes of an answer, unless it is a single piece
LARGEST = 64 << 20  # of a frame: a piece of any model is smaller
QUESTION = 1024  # bytes of a question
QUEUE = 16  # messages held per peer
AT_ONCE = 64  # questions that are read before they are answered
PATIENCE = 5.0  # seconds after which a question is asked again

log = logging.getLogger(__name__)


class LessonDoor:
    """A thread that gives away what is in a ring; it holds the interpreter for far less than a step at a time, since
    states are sent from where they lie, and encrypted by ZeroMQ's own thread.

    What is on its way to a reader that dies is lost.

    Args:
        host: the address to listen on; the port is free and chosen by the system.
        secret: the deployment's.

    Attributes:
        address: "tcp://host:port".
    """

    def __init__(self, ring: Ring, host: str, secret: str) -> None:
        self._ring = ring
        self._server = CurveServer(host, secret, role=DOOR, admitted=READER, queue=QUEUE, linger=0, largest=QUESTION)
        self.address = self._server.address
        self._socket = self._server.socket
        self._stop, self._stopping = (self._server.context.socket(zmq.PAIR) for _ in range(2))
        self._stopping.bind("inproc://stop")
        self._stop.connect("inproc://stop")
        self._thread = Thread(target=self._run, name=DOOR, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.send(b"")
        self._thread.join()
        self._server.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._stopping, self._socket):
            poller.register(socket, zmq.POLLIN)
        try:
            while self._stopping not in dict(poller.poll()):
                for peer, ask in self._asked().items():
                    self._answer(peer, ask)
        except Exception:
            log.exception("the door for lessons has failed; this engine goes on, and nothing of it is learnt from")

    def _asked(self) -> dict[bytes, Ask]:
        """By peer the latest question: one that has been asked again is answered once."""
        asked = dict[bytes, Ask]()
        for _ in range(AT_ONCE):
            if not self._socket.poll(0):
                break
            match self._socket.recv_multipart():
                case [peer, body]:
                    with suppress(ValueError, RecursionError):  # a reader of another version, which hears nothing
                        asked[peer] = decode_ask(body)
        return asked

    def _answer(self, peer: bytes, ask: Ask) -> None:
        taken = self._ring.take(ask.tokens, MESSAGE)
        frames = pack(ask.number, self._ring.stats.held_bytes > 0, taken)
        with suppress(zmq.ZMQError):  # it is gone, or reads nothing
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)


class _Door:
    """A door as its reader sees it. more: it may have something."""

    def __init__(self, context: zmq.Context, address: str, secret: str) -> None:
        self.address, self.more, self._number = address, True, 0
        self._asked: float | None = None
        self.socket = context.socket(zmq.DEALER)
        self.socket.set_hwm(QUEUE)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        authenticate(self.socket, secret, role=READER, server=DOOR)
        self.socket.connect(address)

    @property
    def owes(self) -> bool:
        """Whether it has been asked, and may still answer."""
        return self._asked is not None and monotonic() - self._asked < PATIENCE

    def ask(self, tokens: int) -> None:
        self._number += 1
        self._asked = monotonic()
        with suppress(zmq.Again):  # it has not heard the last ones either
            self.socket.send(encode(Ask(self._number, tokens)), zmq.NOBLOCK)

    def receive(self) -> list[Captured]:
        """One message that has come."""
        try:
            answer, found = unpack([frame.buffer for frame in self.socket.recv_multipart(copy=False)])
        except ValueError as error:
            log.warning("what came from the engine at %s is no lesson and is dropped: %s", self.address, error)
            self.more, self._asked = False, None
            return []
        if answer.number == self._number:
            self.more, self._asked = answer.more, None
        return found


class LessonReader:
    """Reads at the doors of any engines; it belongs to one thread.

    Args:
        secret: the deployment's. Without the right one, doors say nothing.
    """

    def __init__(self, secret: str) -> None:
        self._context, self._secret = zmq.Context(), secret
        self._doors: dict[str, _Door] = {}
        self._kept = deque[Captured]()  # what came behind its time, or on top of what was asked for

    def look_at(self, addresses: tuple[str, ...]) -> None:
        """From now on at these doors; others are left."""
        for address in self._doors.keys() - set(addresses):
            self._doors.pop(address).socket.close()
        for address in addresses:
            if address not in self._doors:
                self._doors[address] = _Door(self._context, address, self._secret)

    def read(self, tokens: int, seconds: float) -> list[Captured]:
        """What all doors have, up to so many tokens (or one piece that has more), as soon as every one has told that
        there is no more; after `seconds` what has come by then. Whether tokens are in a vocabulary is for whoever knows
        one."""
        until = monotonic() + seconds
        for door in self._doors.values():
            door.more = True
        while (missing := tokens - sum(len(one.lesson.tokens) for one in self._kept)) > 0:
            for door in self._doors.values():
                if door.more and not door.owes:
                    door.ask(missing)
            asked, left = [door for door in self._doors.values() if door.owes], max(0.0, until - monotonic())
            ready = self._ready(asked, left)
            for door in ready:
                self._kept.extend(door.receive())
            if not ready and (not asked or not left):
                break
        return self._taken(tokens)

    def close(self) -> None:
        self._context.destroy(linger=0)

    @staticmethod
    def _ready(doors: list[_Door], seconds: float) -> list[_Door]:
        """Those that have said something, waiting at most so long for the first, or until one is to be asked again."""
        poller = zmq.Poller()
        for door in doors:
            poller.register(door.socket, zmq.POLLIN)
        heard = dict(poller.poll(int(1000 * min(seconds, PATIENCE)))) if doors else {}
        return [door for door in doors if door.socket in heard]

    def _taken(self, tokens: int) -> list[Captured]:
        taken = list[Captured]()
        while self._kept and (not taken or len(self._kept[0].lesson.tokens) <= tokens):
            taken.append(self._kept.popleft())
            tokens -= len(taken[-1].lesson.tokens)
        return taken
