"""Attention/FFN disaggregation: one loop over blocks, run by two pools of ranks that each hold half of the modules.

A ranks hold attention, KV cache, embedding, norms and head, each for sequences of its own. F ranks hold the FFN shards
and no request state; they run the rows of all A ranks, one A rank after the other. Both sides hold the residual stream
and add what the other side sends, so the lag of the checkpoint alone decides what can run at once: at lag 0
micro-batches in rotation are the ping-pong pipeline of MegaScale-Infer (2504.02263) and Step-3 (2507.19427); at lag 1
both pools work on every layer of one and the same batch.

Letters: T rows of a micro-batch on this side (of one A rank, or of all of them on F), h hidden.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from stepladder.parallel.afd.edges import INPUT, EdgeLost, GlooEdge, Later
from stepladder.parallel.afd.home import Exchange
from stepladder.parallel.afd.pool_link import REMEMBER, Layout, Pool
from stepladder.parallel.clock import Clock
from stepladder.parallel.context import Context
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.parallel.residual import Block, Done, Pending, Reduce, ResidualStream, run_blocks
from stepladder.parallel.shards import ALONE, Placement, Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import ATTENTION, FFN

log = logging.getLogger(__name__)


class AttentionSide(Transformer):
    """What an A rank holds of the model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, pools=(ATTENTION,))

    def forward(  # type: ignore[override]
        self, tokens: Sequence[Tensor], contexts: Sequence[Context], pool: Pool
    ) -> list[Tensor]:
        """One step: tokens [T] of each micro-batch -> final hidden states [T, h], normalised.

        Raises:
            EdgeLost: an F rank is gone, and `pool` finds none in its place.
        """
        streams = [
            ResidualStream(self.embed(ids, context), remember=REMEMBER)
            for ids, context in zip(tokens, contexts, strict=True)
        ]
        pool.begin(streams, self.blocks)

        def contribute(number: int, block: Block, micro: int, stream: ResidualStream, context: Any) -> list[Pending]:
            parts: list[Pending] = []
            if block.modules:
                mine = _if_rows(block, stream.input(block.lag), context)
                pool.send(number, micro, mine)
                parts.append(Done(mine))
            if block.elsewhere:
                parts.append(pool.receive(number, micro))
            return parts

        hidden = self.finish(streams, contexts, contribute)
        pool.settle()
        return hidden


class FeedForwardSide(Transformer):
    """What an F rank holds of the model: its shard of every FFN. `reduce` adds up the F ranks' partial sums.

    The rows of A rank i go back as partial sums, which A adds up in the order of the F ranks; so does `reduce`. Where
    rows live on one F rank each (`Placement.home`), a rank has its own rows only, and sends them back whole.

    Args:
        mesh: of the F ranks, where rows live on one each.

    Attributes:
        busy: seconds inside its FFNs since it began. calls: of them. clock: of this rank.
    """

    def __init__(
        self,
        spec: ModelSpec,
        place: Placement | Shard = ALONE,
        reduce: Reduce = Done,
        mesh: Mesh | None = None,
    ) -> None:
        place = Placement.of(place)
        super().__init__(spec, place, Done if place.home else reduce, pools=(FFN,))
        if place.home and spec.experts:
            assert mesh is not None
            across = Exchange(mesh, place, spec.experts.count)
            for module in self.modules():
                if isinstance(module, MixtureOfExperts):
                    module.across = across
        self.busy, self.calls, self.clock = 0.0, 0, Clock()

    def forward(self, edges: Sequence[GlooEdge | None], layout: Layout) -> set[int]:  # type: ignore[override]
        """One step, with the edges to the A ranks that `layout` names, in its order.

        Returns:
            The places in `layout` of A ranks that were lost on the way (or before: None among the edges). Their rows
            went on as zeros, and nobody waited for them.
        """
        if self.placement.home:
            layout = layout.home(self.placement.experts.rank, self.placement.experts.size)
        sources = _Sources(edges, layout, self.spec, self.clock)

        def contribute(number: int, block: Block, micro: int, stream: ResidualStream, context: Any) -> list[Pending]:
            if number < layout.resume.first and block.modules:
                return [sources.receive(number, micro)]  # computed by the pool before this one
            parts: list[Pending] = []
            if block.elsewhere:
                parts.append(sources.receive(number, micro))
            if block.modules:
                parts.append(self._compute(number, block, micro, stream, sources))
            return parts

        inputs = [sources.receive(INPUT, micro) for micro in range(layout.micro_batches)]
        streams = [ResidualStream(x.wait(), layout.resume.start) for x in inputs]
        run_blocks(self.blocks, streams, [None] * len(streams), contribute)
        sources.settle()
        return sources.lost

    def _compute(self, number: int, block: Block, micro: int, stream: ResidualStream, sources: "_Sources") -> Pending:
        """This rank's partial sum: to every A rank its rows, and the whole of it to the other F ranks."""
        x, began = stream.input(block.lag), monotonic()
        partial = block(x, None) if self.placement.home else _if_rows(block, x, None)  # others may need this rank
        self.busy += monotonic() - began
        self.calls += 1
        sources.send(number, micro, partial)
        return self.reduce(partial) if len(partial) else Done(partial)


class _Sources:
    """The A ranks of one step, as one batch: their rows one after the other. Who is lost brings zeros."""

    def __init__(self, edges: Sequence[GlooEdge | None], layout: Layout, spec: ModelSpec, clock: Clock) -> None:
        self._edges, self._layout, self._spec, self._clock = edges, layout, spec, clock
        self.lost = {source for source, edge in enumerate(edges) if edge is None}

    def receive(self, block: int, micro: int) -> Pending:
        parts = [self._receive(source, block, micro) for source in range(len(self._edges))]

        def wait() -> Tensor:
            with self._clock.waiting:
                rows = [self._rows(source, micro, part) for source, part in enumerate(parts)]
            return torch.cat(rows)

        return Later(wait)

    def send(self, block: int, micro: int, rows: Tensor) -> None:
        counts = [tokens[micro] for tokens in self._layout.tokens]
        for source, mine in enumerate(rows.split(counts)):
            edge = self._edges[source]
            if edge is not None and source not in self.lost and len(mine):
                edge.send(self._layout.header(block, micro, source), mine)

    def settle(self) -> None:
        for source, edge in enumerate(self._edges):
            if edge is not None and source not in self.lost:
                with self._noting(source):
                    edge.settle()

    @contextmanager
    def _noting(self, source: int) -> Iterator[None]:
        """An A rank that is lost here is lost for the rest of the step."""
        try:
            yield
        except EdgeLost as error:
            log.warning("A rank %d of this step is lost: %s", source, error)
            self.lost.add(source)

    def _receive(self, source: int, block: int, micro: int) -> Pending:
        header, edge = self._layout.header(block, micro, source), self._edges[source]
        if edge is not None and source not in self.lost and header.tokens:
            return edge.receive(header, self._spec.hidden_size, self._spec.dtype)
        return Done(self._nothing(source, micro))

    def _rows(self, source: int, micro: int, part: Pending) -> Tensor:
        with self._noting(source):
            return part.wait()
        return self._nothing(source, micro)

    def _nothing(self, source: int, micro: int) -> Tensor:
        """In place of the rows of an A rank that is lost."""
        return torch.zeros(self._layout.tokens[source][micro], self._spec.hidden_size, dtype=self._spec.dtype)


def _if_rows(block: Block, x: Tensor, context: Any) -> Tensor:
    return block(x, context) if len(x) else torch.zeros_like(x)
