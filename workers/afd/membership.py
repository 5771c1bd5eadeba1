"""An attention rank's membership of the FFN pool: it joins, opens steps, and finds the next pool when one is lost."""

import hashlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic

import torch.distributed as dist

from stepladder.parallel.afd.control import Announcement, Line
from stepladder.parallel.afd.edges import EdgeLost, GlooEdge, first_line
from stepladder.parallel.afd.pool_link import BEGINNING, Layout, Link, Resume
from stepladder.parallel.afd.wire import Wire
from stepladder.parallel.clock import Clock
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.rank import PoolAddress

log = logging.getLogger(__name__)

SIGN_SECONDS = 0.5  # while it waits for a pool, how often this rank says that it is alive, and tries to join
UNNAMED_SECONDS = 2.0  # how long a pool is kept that is not named any more: a new controller has to find it first


@dataclass(frozen=True)
class _Joined:
    """This rank's ends of everything between it and one life of the pool."""

    pool: PoolAddress
    store: dist.Store
    line: Line
    edges: list[GlooEdge]

    def disconnect(self) -> None:
        """From any thread: whoever waits for this pool waits no more."""
        self.line.disconnect()
        for edge in self.edges:
            edge.disconnect()


@dataclass(frozen=True)
class _Lost:
    """A life of the pool that this rank has lost, or that has not admitted it. Times are monotonic seconds.

    Attributes:
        since: when that happened first.
        retry: when it may be tried again; never if it refuses this rank.
    """

    pool: PoolAddress
    since: float
    retry: float
    why: str


class Membership:
    """Of one attention rank, for the whole of its life.

    Args:
        spec: the model's. host: where other machines reach this one. secret: the deployment's.
        deadline: how long a message may take.
        patience: seconds that a pool which was lost here may stay the one that the controller names. Meanwhile this
            rank tries to join it again: it may have been too busy.
        send_as: how rows travel to F. home: to one F rank each, see `Link`.
        clock: of this rank.

    Attributes:
        sign: called now and then while this rank waits for a pool.
        resumes: steps that went on with another pool. resumed_block: the first that the last such pool computed.
        ffn_seconds: what a block took F of late.
    """

    def __init__(
        self,
        spec: ModelSpec,
        host: str,
        secret: str,
        deadline: timedelta,
        patience: float,
        send_as: Wire,
        clock: Clock | None = None,
        home: bool = False,
    ) -> None:
        self._clock, self._home = clock or Clock(), home
        self._spec, self._host, self._secret = spec, host, secret
        self._deadline, self._patience, self._send_as = deadline, patience, send_as
        self.sign: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._named: PoolAddress | None = None  # by the controller
        self._joined: _Joined | None = None
        self._joining: PoolAddress | None = None  # a thread is joining it
        self._lost: _Lost | None = None
        self.resumes, self.resumed_block, self.ffn_seconds = 0, -1, 0.0

    def meet(self, pool: PoolAddress | None) -> None:
        """The pool that there is now, from any thread; None while there is none. Nobody waits for another any more."""
        with self._changed:
            self._named = pool
            self._changed.notify_all()
        if pool is None:
            timer = threading.Timer(UNNAMED_SECONDS, self._part)
            timer.daemon = True
            timer.start()
        else:
            self._part()

    def open(self, tokens: Sequence[int]) -> Link:
        """Begin a step with so many tokens in each micro-batch; the pool may ask for more, empty ones.

        Raises:
            EdgeLost: the pool is lost to this rank, but to nobody else.
        """
        with self._clock.waiting:
            edges, layout = self._begin(tuple(tokens))

        def again(resume: Resume, lost: EdgeLost) -> tuple[Sequence[GlooEdge], Layout]:
            log.warning("%s; waiting for the next pool, which begins at block %d", lost, resume.first)
            self._lose(lost)
            self.resumes, self.resumed_block = self.resumes + 1, resume.first
            return self._begin(layout.tokens[0], resume)

        return Link(edges, layout, self._spec, again, self._clock, self._home)

    def idle(self) -> None:
        """Nothing to do: the others need not wait for this rank. Joins a pool that has come up; never waits for one.

        Raises:
            EdgeLost: as `open`.
        """
        with self._changed:
            joined = self._look()
        if joined is not None:
            try:
                joined.line.announce(Announcement())
                self._lost = None
            except EdgeLost as error:
                log.warning("%s", error)
                self._lose(error)

    def leave(self) -> None:
        if self._joined is not None:
            with suppress(EdgeLost):
                self._joined.line.announce(Announcement(leaves=True))
            self._joined = None

    def _begin(self, tokens: tuple[int, ...], resume: Resume | None = None) -> tuple[Sequence[GlooEdge], Layout]:
        while True:
            joined = self._join()
            try:
                joined.line.announce(Announcement(tokens, resume))
                opening = joined.line.opening()
            except EdgeLost as error:
                log.warning("%s", error)
                self._lose(error)
                continue
            self._lost = None
            self.ffn_seconds = opening.ffn_nanoseconds / 1e9
            padded = (*tokens, *[0] * (opening.micro_batches - len(tokens)))
            return joined.edges, Layout(opening.generation, opening.number, (padded,), resume or BEGINNING)

    def _part(self) -> None:
        """Disconnect from a pool that the controller does not name any more: it may be silent for ever."""
        with self._changed:
            joined = self._joined
            if joined is None or joined.pool == self._named:
                return
        joined.disconnect()

    def _lose(self, error: EdgeLost) -> None:
        with self._changed:
            joined, self._joined = self._joined, None
            if joined is not None:
                self._note_loss(joined.pool, error, monotonic())
        if joined is not None:
            joined.disconnect()  # F must not wait for us

    def _note_loss(self, pool: PoolAddress, error: Exception, retry: float) -> None:
        known = self._lost_of(pool)
        self._lost = _Lost(pool, known.since if known else monotonic(), retry, first_line(error))

    def _lost_of(self, pool: PoolAddress) -> _Lost | None:
        return self._lost if self._lost and self._lost.pool == pool else None

    def _join(self) -> _Joined:
        """The pool that this rank belongs to; waits for one if it has none, and keeps giving signs of life."""
        while True:
            with self._changed:
                if joined := self._look():
                    return joined
                self._changed.wait(SIGN_SECONDS)
            self.sign()

    def _look(self) -> _Joined | None:
        """The pool that this rank belongs to, if it does; else begins to join the one that the controller names."""
        pool = self._named
        if self._joined is not None or pool is None:
            return self._joined
        lost = self._lost_of(pool)
        if lost and monotonic() - lost.since > self._patience:
            raise EdgeLost(f"pool {pool.generation} is lost to this rank, but the controller keeps it; {lost.why}")
        if pool != self._joining and (lost is None or monotonic() >= lost.retry):
            self._joining = pool
            threading.Thread(target=self._join_named, args=(pool,), daemon=True, name="pool-join").start()
        return None

    def _join_named(self, pool: PoolAddress) -> None:
        """In a thread: a pool that is just dying answers nobody until a deadline has passed."""
        refusal: RuntimeError | ValueError | None = None
        try:
            joined = self._join_store(pool)
        except (RuntimeError, ValueError) as error:
            log.warning("pool %d: %s", pool.generation, first_line(error))
            refusal = error.with_traceback(None)
        with self._changed:
            if self._joining != pool:
                return  # this one was given up meanwhile
            self._joining = None
            if refusal is not None:
                again = monotonic() + SIGN_SECONDS if isinstance(refusal, RuntimeError) else math.inf
                self._note_loss(pool, refusal, again)
            elif self._named == pool:
                self._joined = joined
            self._changed.notify_all()

    def _join_store(self, pool: PoolAddress) -> _Joined:
        host, port = pool.address.rsplit(":", 1)
        store = dist.PrefixStore(pool.prefix, dist.TCPStore(host, int(port), None, False, timeout=self._deadline))
        number = store.add(JOINS, 1)
        store.set(join_key(number), token(self._secret, pool.prefix, number))
        line = Line(store, str(number), 0, self._host, self._deadline)
        names = [edge_name(number, rank) for rank in range(pool.size)]
        edges = [GlooEdge(store, n, 0, self._host, self._deadline, send_as=self._send_as) for n in names]
        log.info("joined pool %d as its member %d", pool.generation, number)
        return _Joined(pool, store, line, edges)


JOINS = "joined"  # the name of a counter in the pool's store


def join_key(number: int) -> str:
    """Where the `number`-th attention rank asks to join."""
    return f"join {number}"


def edge_name(number: int, rank: int) -> str:
    """Of the edge between the pool's member `number` and its rank `rank`."""
    return f"a{number}-f{rank}"


def token(secret: str, prefix: str, number: int) -> str:
    """What shows that the `number`-th to join this life of the pool knows the deployment's secret."""
    return hashlib.blake2b(f"{prefix} join {number}".encode(), key=secret.encode()[:64], digest_size=32).hexdigest()
