"""The FFN pool's loop: who belongs to it, when a step begins, and with whose rows.

The first F rank leads. Attention ranks join and leave between steps only. A step begins when every attention rank that
is at work has announced what it brings; one that has nothing to do says so and is not waited for, and one that is
silent is dropped. What a lost pool had begun is gone on with first, one attention rank at a time, since each may have
come to another block.
"""

import logging
import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic

import torch.distributed as dist

from stepladder.kernels.cpu.native import computing
from stepladder.parallel.afd.control import Announcement, Line, Opening
from stepladder.parallel.afd.edges import EdgeLost, GlooEdge
from stepladder.parallel.afd.pool_link import BEGINNING, Layout, Resume
from stepladder.parallel.afd.sides import FeedForwardSide
from stepladder.parallel.afd.wire import Wire
from stepladder.parallel.mesh import Mesh
from stepladder.workers.afd.admission import Admission
from stepladder.workers.afd.membership import edge_name
from stepladder.workers.rank import RankConfig

log = logging.getLogger(__name__)

NOTHING, JOIN, LEAVE, STEP, STOP = range(5)
IDLE_SECONDS = 1.0  # how often the leader tells the others that it is alive


@dataclass
class Member:
    """An attention rank, as the leader knows it.

    Attributes:
        announced: what it brings to the next step.
        at_work: it takes part in steps until it says that it is idle.
        admitted: every F rank has its edge to it, as far as that one still lives.
        heard: when it last said something, or when its last step ended.
    """

    line: Line
    announced: Announcement | None = None
    at_work: bool = False
    admitted: bool = False
    heard: float = field(default_factory=monotonic)


class FeedForwardPool:
    """One F rank.

    Args:
        config: of this rank. side: its weights. mesh: the pool's ranks.
        connect: another connection to the pool's store, for another thread; attention ranks join through that store.
        deadline: how long an attention rank may be silent before it counts as lost. Who waits with the pool meanwhile
            (an F rank in a reduce, the other attention ranks) must be more patient.
        receive_as: how the rows of attention ranks travel.

    Attributes:
        steps: begun, on the leader. resumed: of those, how many another pool had begun.
    """

    def __init__(
        self,
        config: RankConfig,
        side: FeedForwardSide,
        mesh: Mesh,
        connect: Callable[[], dist.Store],
        deadline: timedelta,
        receive_as: Wire,
    ) -> None:
        self.side, self._mesh, self._config = side, mesh, config
        self._deadline, self._receive_as = deadline, receive_as
        self._admission = Admission(connect, config.prefix, config.secret, self._receive)
        self._edges: dict[int, GlooEdge | None] = {}
        self._members: dict[int, Member] = {}
        self._events: queue.Queue[tuple[int, Member | Announcement | None]] = queue.Queue()
        self.steps = self.resumed = 0
        self._told = 0.0, 0  # the side's counters at the last opening

    def lead(self, stopping: Callable[[], bool]) -> None:
        """The first rank, until `stopping`."""
        last_sign, told_idle, clock = monotonic(), False, self._mesh.clock
        with computing(self.side.native), self._admission:
            while not stopping():
                at_work = any(member.at_work for member in self._members.values())
                with clock.waiting if at_work else clock.idle:
                    self._hear(0.0 if self._next() else IDLE_SECONDS)
                self._drop_silent()
                if chosen := self._next():
                    self._open(chosen)
                    last_sign, told_idle = monotonic(), False
                elif monotonic() - last_sign > IDLE_SECONDS or not (at_work or told_idle):
                    self._mesh.broadcast([NOTHING])
                    last_sign, told_idle = monotonic(), not at_work
        self._mesh.broadcast([STOP])

    def follow(self) -> None:
        """The other ranks, until the first one stops."""
        clock, order = self._mesh.clock, [NOTHING]
        with computing(self.side.native), self._admission:
            while True:
                with clock.waiting if order[0] == STEP else clock.idle:
                    order = self._mesh.broadcast(None)
                if order[0] == STOP:
                    return
                self._obey(order)

    def _hear(self, seconds: float) -> None:
        """Take in what has come, waiting at most so long for the first of it."""
        while True:
            try:
                number, news = self._events.get(timeout=seconds) if seconds else self._events.get_nowait()
            except queue.Empty:
                return
            seconds = 0.0
            if isinstance(news, Member):
                self._members[number] = news
            elif news is None:
                self._drop(number, "has left the pool")
            elif member := self._members.get(number):
                self._note(number, member, news)

    def _note(self, number: int, member: Member, news: Announcement) -> None:
        if not member.admitted:
            self._all([JOIN, number])
            member.admitted = True
            log.info("attention rank %d has joined the pool", number)
        member.announced = news if news.tokens else None
        member.at_work, member.heard = bool(news.tokens), monotonic()

    def _drop(self, number: int, why: str) -> None:
        """It is not a member any more, nor about to be one; if it lives, it notices and may join anew."""
        if member := self._members.pop(number, None):
            log.info("attention rank %d %s", number, why)
            member.line.disconnect()
        self._all([LEAVE, number])

    def _drop_silent(self) -> None:
        """Those that die tell so by closing their sockets; a host that is cut off does not."""
        for number, member in list(self._members.items()):
            silent = monotonic() - member.heard
            if not member.announced and silent > self._deadline.total_seconds():
                self._drop(number, f"has said nothing for {silent:.1f} s and counts as lost")

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
        opening = Opening(self._config.generation, self.steps, micro_batches, self._nanoseconds())
        for number in chosen:
            self._members[number].announced = None
            with suppress(EdgeLost):  # its line says so again when it is listened to; the step goes on without it
                self._members[number].line.open(opening)
        self._all(order)
        for number in chosen:
            if self._edges.get(number) is None:
                self._drop(number, "was lost in a step")
            else:
                self._members[number].heard = monotonic()

    def _nanoseconds(self) -> int:
        """What a block took here, on average since the last time this was asked."""
        (busy, calls), self._told = self._told, (self.side.busy, self.side.calls)
        return int(1e9 * (self.side.busy - busy) / max(1, self.side.calls - calls))

    def _all(self, order: list[int]) -> None:
        self._mesh.broadcast(order)
        self._obey(order)

    def _obey(self, order: list[int]) -> None:
        """What every rank of the pool does alike."""
        kind, *rest = order
        if kind == JOIN:
            self._edges[rest[0]] = self._admission.take(rest[0])
        elif kind == LEAVE:
            self._edges.pop(rest[0], None)
            self._admission.forget(rest[0])
        elif kind == STEP:
            self._step(*rest)

    def _step(self, number: int, start: int, first: int, micro_batches: int, *rows: int) -> None:
        width = 1 + micro_batches
        chosen = [rows[i] for i in range(0, len(rows), width)]
        tokens = tuple(tuple(rows[i + 1 : i + width]) for i in range(0, len(rows), width))
        layout = Layout(self._config.generation, number, tokens, Resume(start, first))
        for place in self.side([self._edges.get(n) for n in chosen], layout):
            self._edges[chosen[place]] = None

    def _receive(self, store: dist.Store, number: int) -> GlooEdge:
        """In a thread: this rank's end of the edge to a rank that joins, and on the first rank of the line to it."""
        host, rank, deadline = self._config.host, self._mesh.shard.rank, self._deadline
        try:
            line = None if rank else Line(store, str(number), 1, host, deadline)
            edge = GlooEdge(store, edge_name(number, rank), 1, host, deadline, receive_as=self._receive_as)
        except (RuntimeError, ValueError):
            if not rank:
                self._events.put((number, None))  # the other ranks may have an edge to it
            raise
        if line:
            self._events.put((number, Member(line)))
            line.listen(number, self._events)
        return edge
