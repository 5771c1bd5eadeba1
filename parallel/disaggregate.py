"""Attention/FFN disaggregation: one loop over blocks, run by two pools of ranks that each hold half of the modules.

A ranks hold attention, KV cache, embedding, norms and head, each for sequences of its own. F ranks hold the FFN shards
and no request state; they run the rows of all A ranks, one A rank after the other. Both sides hold the residual stream
and add what the other side sends, so the lag of the checkpoint alone decides what can run at once: at lag 0
micro-batches in rotation are the ping-pong pipeline of MegaScale-Infer (2504.02263) and Step-3 (2507.19427); at lag 1
both pools work on every layer of one and the same batch.

Letters: T rows of a micro-batch on this side (of one A rank, or of all of them on F), h hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.rope import rope_frequencies, rope_table
from parallel.context import Context
from parallel.edges import INPUT, Edge, Header
from parallel.modules import Attention, FeedForward, Norm, VocabParallel
from parallel.residual import Block, Done, Pending, Reduce, ResidualStream, run_blocks
from parallel.shards import Shard, whole
from parallel.spec import ModelSpec
from parallel.wiring import wiring

ATTENTION, FFN = "a", "f"
POOLS = {"attention": ATTENTION, "ffn": FFN}  # who computes which module


@dataclass(frozen=True)
class Layout:
    """The rows of one step, which hold until it ends.

    generation, number: of the deployment's life and of the step. tokens: [A ranks][micro-batches]; 0 sends nothing.
    """

    generation: int
    number: int
    tokens: tuple[tuple[int, ...], ...]

    @property
    def micro_batches(self) -> int:
        return len(self.tokens[0])

    def header(self, block: int, micro: int, source: int) -> Header:
        """Of a message with the rows of A rank `source`, in either direction."""
        return Header(self.generation, self.number, block, micro, self.tokens[source][micro])


def half(spec: ModelSpec, pool: str, shard: Shard) -> tuple[nn.ModuleList, list[Block]]:
    """The modules of one pool, and all blocks of the model as this pool sees them."""
    kinds = {"attention": Attention, "ffn": FeedForward}
    modules, blocks = nn.ModuleList(), []
    for plan in wiring(spec):
        mine = [kinds[name](spec, plan.layer, shard) for name in plan.modules if POOLS[name] == pool]
        modules.extend(mine)
        others = sorted({POOLS[name] for name in plan.modules} - {pool})
        blocks.append(Block(plan.lag, mine, others))
    return modules, blocks


class AttentionSide(nn.Module):
    """What an A rank holds of the model, and its end of the edges to every F rank, in their order."""

    frequencies: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.shard = spec, Shard()
        self.embedding = VocabParallel(spec, "model.embed_tokens.weight", self.shard)
        self.attentions, self.blocks = half(spec, ATTENTION, self.shard)
        self.norm = Norm(spec, whole("model.norm.weight", spec.hidden_size))
        self.head = self.embedding if spec.tie_embeddings else VocabParallel(spec, "lm_head.weight", self.shard)
        frequencies = rope_frequencies(spec.head_dim, spec.rope_theta, torch.get_default_device(), spec.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def num_kv_heads(self) -> int:
        return self.spec.num_kv_heads

    def forward(
        self, tokens: Sequence[Tensor], contexts: Sequence[Context], edges: Sequence[Edge], layout: Layout, rank: int
    ) -> list[Tensor]:
        """One step of A rank `rank`: tokens [T] of each micro-batch -> final hidden states [T, h], normalised.

        Raises:
            EdgeLost: an F rank is gone.
        """
        inputs = [self.embedding.embed(ids) for ids in tokens]
        for micro, (x, context) in enumerate(zip(inputs, contexts, strict=True)):
            tables = rope_table(context.positions, self.frequencies, x.dtype, self.spec.rope_interleaved)
            context.cos, context.sin = tables
            _send(edges, layout.header(INPUT, micro, rank), x)

        def contribute(
            number: int, block: Block, micro: int, stream: ResidualStream, context: Any
        ) -> Sequence[Pending]:
            header = layout.header(number, micro, rank)
            parts: dict[str, Pending] = {}
            if block.modules:
                mine = _if_rows(block, stream, context, header.tokens)
                _send(edges, header, mine)
                parts[ATTENTION] = Done(mine)
            if block.elsewhere:
                parts[FFN] = _Sum([_receive(edge, header, self.spec) for edge in edges])
            return [parts[pool] for pool in sorted(parts)]

        hidden = run_blocks(self.blocks, inputs, contexts, contribute)
        for edge in edges:
            edge.settle()
        return [self.norm(x) for x in hidden]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, h] -> [R, vocabulary]."""
        return self.head.logits(hidden)[:, : self.spec.vocab_size]


class FeedForwardSide(nn.Module):
    """What an F rank holds of the model: its shard of every FFN. `reduce` adds up the F ranks' partial sums.

    The rows of A rank i go back as partial sums, which A adds up in the order of the F ranks; so does `reduce`.
    """

    def __init__(self, spec: ModelSpec, shard: Shard = Shard(), reduce: Reduce = Done) -> None:  # noqa: B008
        super().__init__()
        self.spec, self.shard, self.reduce = spec, shard, reduce
        self.ffns, self.blocks = half(spec, FFN, shard)

    def forward(self, edges: Sequence[Edge], layout: Layout) -> None:
        """One step, with the edges to every A rank, in their order.

        Raises:
            EdgeLost: an A rank is gone.
        """
        micros = range(layout.micro_batches)

        def rows(block: int, micro: int) -> Pending:
            headers = [layout.header(block, micro, source) for source in range(len(edges))]
            return _Rows([_receive(e, h, self.spec) for e, h in zip(edges, headers, strict=True)])

        def contribute(
            number: int, block: Block, micro: int, stream: ResidualStream, context: Any
        ) -> Sequence[Pending]:
            parts: dict[str, Pending] = {}
            if block.elsewhere:
                parts[ATTENTION] = rows(number, micro)
            if block.modules:
                parts[FFN] = self._compute(number, block, micro, stream, edges, layout)
            return [parts[pool] for pool in sorted(parts)]

        inputs = [rows(INPUT, micro) for micro in micros]
        run_blocks(self.blocks, [x.wait() for x in inputs], [None] * len(micros), contribute)
        for edge in edges:
            edge.settle()

    def _compute(
        self, number: int, block: Block, micro: int, stream: ResidualStream, edges: Sequence[Edge], layout: Layout
    ) -> Pending:
        """This rank's partial sum: to every A rank its rows, and the whole of it to the other F ranks."""
        counts = [tokens[micro] for tokens in layout.tokens]
        partial = _if_rows(block, stream, None, sum(counts))
        for source, (edge, mine) in enumerate(zip(edges, partial.split(counts), strict=True)):
            _send([edge], layout.header(number, micro, source), mine)
        return self.reduce(partial) if len(partial) else Done(partial)


def _if_rows(block: Block, stream: ResidualStream, context: Any, tokens: int) -> Tensor:
    x = stream.input(block.lag)
    return block(x, context) if tokens else torch.zeros_like(x)


def _send(edges: Sequence[Edge], header: Header, rows: Tensor) -> None:
    if header.tokens:
        for edge in edges:
            edge.send(header, rows)


def _receive(edge: Edge, header: Header, spec: ModelSpec) -> Pending:
    if not header.tokens:
        return Done(torch.empty(0, spec.hidden_size, dtype=spec.dtype))
    return edge.receive(header, spec.hidden_size, spec.dtype)


class _Sum:
    """Partial sums on their way from several ranks, added up in the ranks' order."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts

    def wait(self) -> Tensor:
        first, *rest = [part.wait() for part in self._parts]
        for part in rest:
            first = first + part
        return first


class _Rows:
    """Rows on their way from several ranks, one rank's after the other's."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts

    def wait(self) -> Tensor:
        return torch.cat([part.wait() for part in self._parts])
