"""An attention rank's tie to the FFN pool during one step. It outlives the pool.

A layer call on F is idempotent: the A rank remembers the newest points of its stream and its own contributions since,
so when an F rank is lost, the pool that replaces it is sent those and goes on from the first contribution that has not
been folded in. Nobody waits longer than that, and nothing is computed twice on this side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from time import monotonic
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.parallel.afd.edges import INPUT, EdgeLost, GlooEdge, Header, Later
from stepladder.parallel.clock import Clock
from stepladder.parallel.residual import Block, Done, Fold, Pending, ResidualStream
from stepladder.parallel.shards import equal_shares
from stepladder.parallel.spec import ModelSpec

REMEMBER = 8  # points of a stream; micro-batches in rotation are at most one contribution of F apart


class Resume(NamedTuple):
    """Where a new pool begins. start: contributions in the stream that it is sent; first: the first block that it
    computes. Those between come from A, whoever made them."""

    start: int
    first: int


BEGINNING = Resume(0, 0)


@dataclass(frozen=True)
class Layout:
    """The rows of one step, which hold until it ends.

    Attributes:
        generation, number: of the pool's life and of the step.
        tokens: [A ranks][micro-batches]; 0 sends nothing. An A rank knows of itself only.
        resume: where the pool begins.
    """

    generation: int
    number: int
    tokens: tuple[tuple[int, ...], ...]
    resume: Resume = BEGINNING

    @property
    def micro_batches(self) -> int:
        return len(self.tokens[0])

    def home(self, rank: int, size: int) -> "Layout":
        """Of the rows that live on one F rank: as even a share of every micro-batch as there can be, contiguous."""
        tokens = tuple(tuple(equal_shares(count, size)[rank] for count in own) for own in self.tokens)
        return replace(self, tokens=tokens)

    def header(self, block: int, micro: int, source: int = 0) -> Header:
        """Of a message with the rows of the A rank at `source`, in either direction."""
        return Header(self.generation, self.number, block, micro, self.tokens[source][micro])


Again = Callable[[Resume, EdgeLost], tuple[Sequence[GlooEdge], Layout]]
"""Waits for the next pool, opens the step there, returns the new edges and layout. Raises EdgeLost if none comes."""


class Pool:
    """What an attention side needs of the FFN side. This one has no ranks and answers with zeros, so that an attention
    side can be measured alone; `Link` leads to a real one."""

    def begin(self, streams: Sequence[ResidualStream], blocks: Sequence[Block]) -> None:
        """Send x_0 of every micro-batch."""
        self._zeros = [torch.zeros_like(stream.input(0)) for stream in streams]

    def send(self, block: int, micro: int, rows: Tensor) -> None:
        """Send this side's contribution to a block."""

    def receive(self, block: int, micro: int) -> Pending:
        """The pool's contribution to a block."""
        return Done(self._zeros[micro])

    def settle(self) -> None:
        """The step is over."""


class Link(Pool):
    """The pool as it really is: edges to every F rank, in their order.

    Args:
        edges, layout: of this step; `layout.tokens` has one row, this rank's.
        spec: the model's; rows have its hidden size and dtype.
        clock: of this rank.
        home: rows go to one F rank each, as `Layout.home` has it, and come back whole; else to all, and come back as
            partial sums.
        again: finds the next pool when an edge is lost; without it, or when it finds none, EdgeLost goes through.

    Attributes:
        waited: seconds that this side has waited for F.
    """

    def __init__(
        self,
        edges: Sequence[GlooEdge],
        layout: Layout,
        spec: ModelSpec,
        again: Again | None = None,
        clock: Clock | None = None,
        home: bool = False,
    ) -> None:
        self._clock, self._home = clock or Clock(), home
        self.edges, self.layout, self._spec, self._again = edges, layout, spec, again
        self.waited = 0.0
        self._mine: dict[tuple[int, int], Tensor] = {}
        self._posted: dict[tuple[int, int], Pending] = {}

    def begin(self, streams: Sequence[ResidualStream], blocks: Sequence[Block]) -> None:
        self._streams, self._blocks = streams, blocks
        for micro, stream in enumerate(streams):
            self._send(INPUT, micro, stream.input(0))

    def send(self, block: int, micro: int, rows: Tensor) -> None:
        self._mine[block, micro] = rows
        self._mine.pop((block - REMEMBER, micro), None)
        self._send(block, micro, rows)

    def receive(self, block: int, micro: int) -> Pending:
        self._post(block, micro)
        return Later(partial(self._take, block, micro))

    def _take(self, block: int, micro: int) -> Tensor:
        """Wait for the pool's contribution to a block, whichever pool it is that computes it."""
        began = monotonic()
        with self._clock.waiting:
            while True:
                try:
                    rows = self._posted[block, micro].wait()
                    break
                except EdgeLost as error:
                    self._mend(error.with_traceback(None))  # which would keep the old sockets open
        del self._posted[block, micro]
        self.waited += monotonic() - began
        return rows

    def settle(self) -> None:
        """Everything has come; what F did not need any more may be lost with it."""
        try:
            for pending in self._posted.values():
                pending.wait()  # what was folded in before the pool was lost, computed once more
            for edge in self.edges:
                edge.settle()
        except EdgeLost:
            if self._again is None:
                raise

    def _mend(self, lost: EdgeLost) -> None:
        """The pool is gone: go on with the next one, from the first contribution that is not folded in everywhere."""
        if self._again is None:
            raise lost
        done = min(stream.done for stream in self._streams)
        first = next(n for n, block in enumerate(self._blocks) if block.elsewhere and n >= done)
        start = max(0, min(first - self._blocks[first].lag, done))
        asked = self._asked
        for edge in self.edges:
            edge.abort()  # those that live must not wait for us
        self.edges = ()
        self._posted.clear()
        self.edges, self.layout = self._again(Resume(start, first), lost)
        self._send_again(start, first)
        for block, micro in asked:
            if block >= first:
                self._post(block, micro)

    def _send_again(self, start: int, first: int) -> None:
        """x with `start` contributions, then what followed it, in the order in which F reads it."""
        points = [{fold.done: fold for fold in stream.past} for stream in self._streams]
        for micro, known in enumerate(points):
            self._send(INPUT, micro, known[start].x)
        for block in range(start, len(self._blocks)):
            for micro, known in enumerate(points):
                rows = self._known(block, micro, first, known)
                if rows is not None:
                    self._send(block, micro, rows)

    def _known(self, block: int, micro: int, first: int, points: dict[int, Fold]) -> Tensor | None:
        """A block's whole contribution where F will not compute its part, else ours; None if there is none yet."""
        if block < first and self._blocks[block].elsewhere:
            return points[block + 1].total
        return self._mine.get((block, micro))

    @property
    def _asked(self) -> list[tuple[int, int]]:
        """All that this step has received or waits for, in the order in which F sends it."""
        last_block, last_micro = max(self._posted)
        return [
            (number, micro)
            for number, block in enumerate(self._blocks[: last_block + 1])
            for micro in range(len(self._streams))
            if block.elsewhere and (number, micro) <= (last_block, last_micro)
        ]

    def _send(self, block: int, micro: int, rows: Tensor) -> None:
        headers = self._headers(block, micro)
        parts = rows.split([header.tokens for header in headers]) if self._home else [rows] * len(headers)
        for edge, header, part in zip(self.edges, headers, parts, strict=True):
            if header.tokens:
                edge.send(header, part)

    def _post(self, block: int, micro: int) -> None:
        hidden, dtype = self._spec.hidden_size, self._spec.dtype
        headers = zip(self.edges, self._headers(block, micro), strict=True)
        parts = [edge.receive(header, hidden, dtype) for edge, header in headers if header.tokens]
        # rows of several ranks; or partial sums of all of them, added up in the ranks' order
        joined: Callable[[list[Tensor]], Tensor] = torch.cat if self._home else partial(reduce, torch.add)
        if parts:
            self._posted[block, micro] = Later(lambda: joined([part.wait() for part in parts]))
        else:
            self._posted[block, micro] = Done(torch.empty(0, hidden, dtype=dtype))

    def _headers(self, block: int, micro: int) -> list[Header]:
        """Of the message to each F rank, and from it."""
        layout, size = self.layout, len(self.edges)
        return [(layout.home(rank, size) if self._home else layout).header(block, micro) for rank in range(size)]
