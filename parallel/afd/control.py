"""Control messages between an attention rank and the first FFN rank: a pair of them per step, none per layer.

An attention rank announces what it brings; when everybody that is at work has, the first FFN rank opens the step. Each
such pair of ranks has a group of its own, so that the loss of one attention rank is noticed at once and by itself.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.parallel.afd.edges import EdgeLost, GlooPair, first_line
from stepladder.parallel.afd.pool_link import Resume

MAX_MICRO_BATCHES = 16
WORDS = 4 + MAX_MICRO_BATCHES
IDLE, WORK, LEAVE = range(3)
UP, DOWN = 0, 1  # tags: to F, to A
NO_TIMEOUT, LEAVING = timedelta(0), timedelta(seconds=1)  # the group's own, and how long who leaves waits for it


class Announcement(NamedTuple):
    """What an attention rank brings to the next step: the tokens of its micro-batches, none if it has nothing to do."""

    tokens: tuple[int, ...] = ()
    resume: Resume | None = None
    leaves: bool = False

    def encode(self) -> Tensor:
        kind = LEAVE if self.leaves else WORK if self.tokens else IDLE
        resume = self.resume or Resume(-1, -1)
        words = [kind, *resume, len(self.tokens), *self.tokens]
        return torch.tensor(words + [0] * (WORDS - len(words)))

    @staticmethod
    def decode(message: Tensor) -> "Announcement":
        kind, start, first, count, *tokens = message.tolist()
        resume = None if start < 0 else Resume(start, first)
        return Announcement(tuple(tokens[:count]), resume, kind == LEAVE)


class Opening(NamedTuple):
    """A step that begins, as its attention ranks hear of it. ffn_nanoseconds: what a block took F of late."""

    generation: int
    number: int
    micro_batches: int
    ffn_nanoseconds: int

    def encode(self) -> Tensor:
        return torch.tensor([*self, *[0] * (WORDS - len(self))])

    @staticmethod
    def decode(message: Tensor) -> "Opening":
        return Opening(*message[: len(Opening._fields)].tolist())


class Line(GlooPair):
    """One end of the control messages of a pair. end: 0 on the A rank, 1 on the first F rank.

    A message may take as long as a step of the others; a peer that dies closes its socket, and from one that is silent
    too long this end disconnects. `deadline` is for both ends to come.

    Raises (all methods): EdgeLost, if the peer is gone.
    """

    def __init__(self, store: dist.Store, name: str, end: int, host: str, deadline: timedelta) -> None:
        self.name = name
        own = dist.PrefixStore(f"line {name}", store)
        own.set(f"here {end}", "yes")
        own.wait([f"here {1 - end}"], deadline)
        super().__init__(own, end, host, timedelta(days=7))
        self._opened: tuple[Any, Tensor] | None = None  # on its way; a handle dropped unwaited loses its message

    def announce(self, announcement: Announcement) -> None:
        """A: what comes next. F listens at all times, so this takes no longer than the way there."""
        with self._noting_loss():
            work = self._group.send([announcement.encode()], self._peer, UP)
            work.wait(LEAVING if announcement.leaves else NO_TIMEOUT)

    def opening(self) -> Opening:
        """A: wait until the step is opened."""
        return Opening.decode(self._receive(DOWN))

    def open(self, opening: Opening) -> None:
        """F: the step begins. It does not wait until A has heard."""
        message = opening.encode()
        with self._noting_loss():
            if self._opened:
                self._opened[0].wait()  # heard long ago: A has announced another step since
            self._opened = self._group.send([message], self._peer, DOWN), message

    def listen(self, number: int, events: queue.Queue) -> None:
        """F: put every announcement into `events` with this line's number, then None when the peer is gone."""

        def run() -> None:
            try:
                while True:
                    announcement = Announcement.decode(self._receive(UP))
                    events.put((number, None if announcement.leaves else announcement))
                    if announcement.leaves:
                        return
            except EdgeLost:
                events.put((number, None))

        threading.Thread(target=run, daemon=True, name=f"line-{self.name}").start()

    def _receive(self, tag: int) -> Tensor:
        message = torch.empty(WORDS, dtype=torch.int64)
        with self._noting_loss():
            self._group.recv([message], self._peer, tag).wait()
        return message

    @contextmanager
    def _noting_loss(self) -> Iterator[None]:
        """An error of the group means that the peer is gone."""
        try:
            yield
        except RuntimeError as error:
            raise EdgeLost(f"control line {self.name}: {first_line(error)}") from None
