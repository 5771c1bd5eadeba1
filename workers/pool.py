"""The FFN pool's loop: who belongs to it, when a step begins, and with whose rows.

The first F rank leads. Attention ranks join and leave between steps only. A step begins when every attention rank that
is at work has announced what it brings; one that has nothing to do says so and is not waited for. What a lost pool had
begun is gone on with first, one attention rank at a time, since each may have come to another block.
"""

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from hmac import compare_digest
from time import monotonic

import torch
import torch.distributed as dist

from parallel.control import Announcement, Line, Opening
from parallel.disaggregate import FeedForwardSide
from parallel.edges import Edge, EdgeLost, GlooEdge
from parallel.link import BEGINNING, Layout, Resume
from parallel.mesh import Mesh
from parallel.wire import Wire
from workers.membership import KNOCKS, edge_name, join_key, token

log = logging.getLogger(__name__)

NOTHING, JOIN, LEAVE, STEP, STOP = range(5)
IDLE_SECONDS = 1.0  # how often the leader tells the others that it is alive
DOOR_SECONDS = 0.05  # how often it looks who has knocked


@dataclass
class Member:
    """An attention rank, as the leader knows it. at_work: it takes part in steps until it says that it is idle."""

    line: Line
    edge: Edge
    announced: Announcement | None = None
    at_work: bool = False


class FeedForwardPool:
    """One F rank.

    Args:
        side: its weights. mesh: the pool's ranks.
        store: the pool's, with the `prefix` of its life; attention ranks join through it.
        generation: of this life.
        host: where other machines reach this one. secret: the deployment's; who joins must know it.
        deadline: how long a message may take.
        receive_as: how the rows of attention ranks travel.

    Attributes:
        steps: begun, on the leader. resumed: of those, how many another pool had begun.
    """

    def __init__(
        self,
        side: FeedForwardSide,
        mesh: Mesh,
        store: dist.Store,
        prefix: str,
        generation: int,
        host: str,
        secret: str,
        deadline: timedelta,
        receive_as: Wire,
    ) -> None:
        self.side, self._mesh, self._store, self._generation = side, mesh, store, generation
        self._prefix = prefix
        self._host, self._secret, self._deadline, self._receive_as = host, secret, deadline, receive_as
        self._edges: dict[int, Edge | None] = {}
        self._members: dict[int, Member] = {}
        self._events: queue.Queue[tuple[int, Member | Announcement | None]] = queue.Queue()
        self.steps = self.resumed = 0
        self._told = 0.0, 0  # the side's counters at the last opening

    @torch.inference_mode()
    def lead(self, connect: Callable[[], dist.Store], stopping: Callable[[], bool]) -> None:
        """The first rank, until `stopping`. connect: another connection to the store, for another thread."""
        threading.Thread(target=self._watch_door, args=(connect, stopping), daemon=True, name="pool-door").start()
        last_sign = monotonic()
        while not stopping():
            self._hear(0.0 if self._next() else IDLE_SECONDS)
            if chosen := self._next():
                self._open(chosen)
                last_sign = monotonic()
            elif monotonic() - last_sign > IDLE_SECONDS:
                self._mesh.broadcast([NOTHING])
                last_sign = monotonic()
        self._mesh.broadcast([STOP])

    @torch.inference_mode()
    def follow(self) -> None:
        """The other ranks, until the first one stops."""
        while (order := self._mesh.broadcast(None))[0] != STOP:
            self._obey(order)

    def _hear(self, seconds: float) -> None:
        """Take in what has come, waiting at most so long for the first of it."""
        while True:
            try:
                number, news = self._events.get(timeout=seconds) if seconds else self._events.get_nowait()
            except queue.Empty:
                return
            seconds, member = 0.0, self._members.get(number)
            if isinstance(news, Member):
                self._admit(number, news)
            elif member is not None and news is None:
                log.info("attention rank %d has left the pool", number)
                del self._members[number]
                self._all([LEAVE, number])
            elif member is not None and news is not None:
                member.announced = news if news.tokens else None
                member.at_work = bool(news.tokens)

    def _next(self) -> list[int]:
        """The members of the next step; none while somebody at work is still expected."""
        announced = {number: m.announced for number, m in self._members.items() if m.announced}
        if begun := [number for number, one in announced.items() if one.resume]:
            return begun[:1]
        if any(m.at_work and not m.announced for m in self._members.values()):
            return []
        return sorted(announced)

    def _open(self, chosen: list[int]) -> None:
        announced = [self._members[number].announced or Announcement() for number in chosen]
        micro_batches = max(len(one.tokens) for one in announced)
        self.steps += 1
        self.resumed += bool(announced[0].resume)
        order = [STEP, self.steps, *(announced[0].resume or BEGINNING), micro_batches]
        for number, one in zip(chosen, announced, strict=True):
            order += [number, *one.tokens, *[0] * (micro_batches - len(one.tokens))]
        opening = Opening(self._generation, self.steps, micro_batches, self._nanoseconds())
        for number in chosen:
            self._members[number].announced = None
            with suppress(EdgeLost):  # its line says so again when it is listened to; the step goes on without it
                self._members[number].line.open(opening)
        self._all(order)

    def _nanoseconds(self) -> int:
        """What a block took here, on average since the last time this was asked."""
        (busy, calls), self._told = self._told, (self.side.busy, self.side.calls)
        return int(1e9 * (self.side.busy - busy) / max(1, self.side.calls - calls))

    def _admit(self, number: int, member: Member) -> None:
        self._mesh.broadcast([JOIN, number])
        self._members[number], self._edges[number] = member, member.edge
        member.line.listen(number, self._events)
        log.info("attention rank %d has joined the pool", number)

    def _all(self, order: list[int]) -> None:
        self._mesh.broadcast(order)
        self._obey(order)

    def _obey(self, order: list[int]) -> None:
        """What every rank of the pool does alike."""
        kind, *rest = order
        if kind == JOIN:
            self._edges[rest[0]] = self._edge_or_none(rest[0])
        elif kind == LEAVE:
            self._edges.pop(rest[0], None)
        elif kind == STEP:
            self._step(*rest)

    def _connect(self, store: dist.Store, number: int) -> Edge:
        name = edge_name(number, self._mesh.shard.rank)
        return GlooEdge(store, name, 1, self._host, self._deadline, receive_as=self._receive_as)

    def _edge_or_none(self, number: int) -> Edge | None:
        try:
            return self._connect(self._store, number)
        except RuntimeError as error:
            log.warning("attention rank %d: %s", number, str(error).splitlines()[0])
            return None

    def _step(self, number: int, start: int, first: int, micro_batches: int, *rows: int) -> None:
        width = 1 + micro_batches
        chosen = [rows[i] for i in range(0, len(rows), width)]
        tokens = tuple(tuple(rows[i + 1 : i + width]) for i in range(0, len(rows), width))
        layout = Layout(self._generation, number, tokens, Resume(start, first))
        for place in self.side([self._edges.get(n) for n in chosen], layout):
            self._edges[chosen[place]] = None

    def _watch_door(self, connect: Callable[[], dist.Store], stopping: Callable[[], bool]) -> None:
        """Let in, each in a thread of its own, those who knock and know the secret."""
        door, known, waiting, pause = connect(), 0, set[int](), threading.Event()
        while not stopping():
            knocks = door.add(KNOCKS, 0)
            waiting |= set(range(known + 1, knocks + 1))  # some have only taken a number so far, and may have died then
            known = knocks
            for number in sorted(n for n in waiting if door.check([join_key(n)])):
                waiting.remove(number)
                if compare_digest(door.get(join_key(number)).decode(), token(self._secret, self._prefix, number)):
                    threading.Thread(target=self._receive_guest, args=(connect, number), daemon=True).start()
                else:
                    log.warning("join %d does not know the deployment's secret; it stays outside", number)
            pause.wait(DOOR_SECONDS)

    def _receive_guest(self, connect: Callable[[], dist.Store], number: int) -> None:
        """Both ends of line and edge come, or do not; nobody else waits for that."""
        try:
            store = connect()
            line = Line(store, str(number), 1, self._host, self._deadline)
            self._events.put((number, Member(line, self._connect(store, number))))
        except RuntimeError as error:
            log.warning("attention rank %d did not come: %s", number, str(error).splitlines()[0])
