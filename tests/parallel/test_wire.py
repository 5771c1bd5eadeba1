"""FP8 rows from attention to FFN: both kinds of edges agree, and equal a model whose two streams are written out."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.kernels.fp8 import dequantise, quantise
from stepladder.parallel.afd.edges import HEADER_BYTES, EdgeLost, GlooEdge, Header, pack
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.afd.wire import FP8, PLAIN, Wire, wire_to_ffn
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.mesh import join
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from tests.llama import write_llama
from tests.loopback import LoopbackEdge

DEADLINE = 20.0
Shapes = Sequence[Sequence[tuple[int, int]]]  # [A rank][micro-batch]: sequences, tokens of each
ONE: Shapes = [[(2, 7), (1, 5)]]
TWO: Shapes = [[(2, 7), (0, 1)], [(1, 9), (3, 2)]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row is one whole group of 128 columns and a part of another."""
    return write_llama(tmp_path_factory.mktemp("llama"), hidden_size=160)


def tokens_of(shapes: Shapes) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [[torch.randint(0, 101, (n * length,), generator=draw) for n, length in micros] for micros in shapes]


def edge_pairs(kind: str, num_a: int, num_f: int, wire: Wire) -> dict[tuple[int, int], tuple[GlooEdge, GlooEdge]]:
    """[A rank, F rank]: the ends of A and of F."""
    names = [(a, f) for a in range(num_a) for f in range(num_f)]
    if kind == "loopback":
        return {(a, f): LoopbackEdge.pair(f"a{a}-f{f}", DEADLINE, send_as=wire) for a, f in names}
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    def end(name: tuple[int, int], number: int) -> GlooEdge:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        wires: dict[str, Wire] = {"receive_as" if number else "send_as": wire}
        return GlooEdge(store, str(name), number, deadline=timedelta(seconds=DEADLINE), **wires)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        return {name: tuple(pool.map(end, [name, name], [0, 1])) for name in names}  # type: ignore[misc]


@torch.inference_mode()
def apart(spec: ModelSpec, path: Path, shapes: Shapes, num_f: int, kind: str, wire: Wire) -> list[list[Tensor]]:
    """Final hidden states [A rank][micro-batch] of the second of two equal steps; every rank is a thread."""
    tokens, edges = tokens_of(shapes), edge_pairs(kind, len(shapes), num_f, wire)
    layouts = [Layout(3, number, tuple(tuple(map(len, micros)) for micros in tokens)) for number in range(2)]
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    done = threading.Barrier(len(shapes) + num_f)

    @torch.inference_mode()
    def attention(a: int) -> list[Tensor]:
        side = AttentionSide(spec)
        load_weights(side, path)
        for layout in layouts:
            mine = replace(layout, tokens=layout.tokens[a : a + 1])
            contexts = [WholeSequences(*shape) for shape in shapes[a]]
            hidden = side(tokens[a], contexts, Link([edges[a, f][0] for f in range(num_f)], mine, spec))
        done.wait()
        return hidden

    @torch.inference_mode()
    def feed_forward(f: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        mesh = join(dist.PrefixStore("f", store), Shard(f, num_f), ordered=True)
        side = FeedForwardSide(spec, mesh.shard, mesh.all_reduce)
        load_weights(side, path)
        for layout in layouts:
            side([edges[a, f][1] for a in range(len(shapes))], layout)
        done.wait()
        mesh.close()

    with ThreadPoolExecutor(len(shapes) + num_f) as pool:
        ffns = [pool.submit(feed_forward, f) for f in range(num_f)]
        attentions = [pool.submit(attention, a) for a in range(len(shapes))]
        for ffn in ffns:
            ffn.result()
        return [each.result() for each in attentions]


def through_fp8(rows: Tensor) -> Tensor:
    """What arrives, column group by column group with torch's own cast."""
    arrived = torch.empty_like(rows)
    for start in range(0, rows.shape[1], 128):
        group = rows[:, start : start + 128]
        scale = group.abs().amax(1, keepdim=True) / 448
        arrived[:, start : start + 128] = (group / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return arrived


@torch.inference_mode()
def written_out(spec: ModelSpec, path: Path, shapes: Shapes, num_f: int) -> list[list[Tensor]]:
    """A whole model of the standard wiring with two streams: A's, and F's, which attention reaches through FP8."""
    model, shards = Transformer(spec), [Transformer(spec, Shard(f, num_f)) for f in range(num_f)]
    for each in (model, *shards):
        load_weights(each, path)
    tokens, results = tokens_of(shapes), [[torch.empty(0)] * len(micros) for micros in shapes]
    for micro in range(len(shapes[0])):
        ids = [mine[micro] for mine in tokens]
        contexts: list[Any] = [WholeSequences(*mine[micro]) for mine in shapes]
        streams = [model.embedding.embed(i) for i in ids]
        for context in contexts:
            context.cos, context.sin = rope(model, context.positions)
        of_ffn = torch.cat([through_fp8(x) for x in streams])
        for layer in range(spec.num_layers):
            (attention,) = model.blocks[2 * layer].modules
            added = [attention(x, c) if len(x) else x for x, c in zip(streams, contexts, strict=True)]
            streams = [x + y for x, y in zip(streams, added, strict=True)]
            of_ffn = of_ffn + torch.cat([through_fp8(y) for y in added])
            total = sum(shard.blocks[2 * layer + 1].modules[0](of_ffn, None) for shard in shards)
            assert isinstance(total, Tensor)
            streams = [x + y for x, y in zip(streams, total.split([len(i) for i in ids]), strict=True)]
            of_ffn = of_ffn + total
        for a, x in enumerate(streams):
            results[a][micro] = model.norm(x)
    return results


def rope(model: Transformer, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None, None] * torch.cat([model.frequencies, model.frequencies])
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("num_f", [1, 2])
@pytest.mark.parametrize("shapes", [ONE, TWO], ids=["1A", "2A"])
def test_fp8_equals_the_model_whose_streams_are_written_out(shapes: Shapes, num_f: int, checkpoint: Path) -> None:
    spec = ModelSpec.load(checkpoint)
    gloo, loopback = (apart(spec, checkpoint, shapes, num_f, kind, FP8) for kind in ("gloo", "loopback"))
    plain = apart(spec, checkpoint, shapes, num_f, "loopback", PLAIN)
    want = written_out(spec, checkpoint, shapes, num_f)
    for a, micros in enumerate(shapes):
        for micro in range(len(micros)):
            got, exact, wanted = gloo[a][micro], plain[a][micro], want[a][micro]
            assert torch.equal(got, loopback[a][micro])
            assert got.shape == wanted.shape == exact.shape
            if len(wanted):
                assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
                assert (got - exact).abs().max() >= 1e-3 * exact.abs().max(), "FP8 must have been on the wire"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_rows_go_to_f_as_fp8_and_come_back_whole(kind: str, dtype: torch.dtype) -> None:
    a, f = edge_pairs(kind, 1, 1, FP8)[0, 0]
    headers = [Header(1, 2, block, 0, rows) for block, rows in enumerate([3, 1, 200])]
    sent = [torch.randn(h.tokens, 300).to(dtype) for h in headers]
    for sender, receiver in ((a, f), (f, a)):
        pending = [receiver.receive(h, 300, dtype) for h in headers]
        for header, rows in zip(headers, sent, strict=True):
            kept = rows.clone()
            sender.send(header, kept)
            kept.zero_()  # it was copied
        for each, rows in zip(pending, sent, strict=True):
            want = dequantise(*quantise(rows), dtype) if sender is a else rows
            got = each.wait()
            assert got.dtype == dtype and torch.equal(got, want)
        sender.settle()


@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_a_peer_that_gives_up_says_so(kind: str) -> None:
    a, f = edge_pairs(kind, 1, 1, FP8)[0, 0]
    pending = f.receive(Header(1, 8, 4, 0, 3), 160, torch.float32)
    a.abort()
    with pytest.raises(EdgeLost, match="the peer gave up"):
        pending.wait()


@pytest.mark.parametrize("hidden", [1, 127, 128, 129, 4096])
@pytest.mark.parametrize("wire", [PLAIN, FP8], ids=lambda wire: wire.name)
def test_the_size_of_a_message_follows_from_its_header(wire: Wire, hidden: int) -> None:
    for tokens in (0, 1, 5):
        for dtype in (torch.float32, torch.bfloat16):
            rows = torch.randn(tokens, hidden).to(dtype)
            body = pack(Header(1, 2, 3, 0, tokens), rows, wire)[HEADER_BYTES:]
            assert len(body) == wire.size(tokens, hidden, dtype)
            assert wire.read(body, hidden, dtype).shape == rows.shape
    assert FP8.size(7, 4096, torch.bfloat16) == 7 * (4096 + 32 * 4)


def test_two_ends_with_different_wires_refuse_each_other() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    def end(number: int) -> GlooEdge:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        return GlooEdge(store, "a0-f0", number, receive_as=FP8 if number else PLAIN)

    with ThreadPoolExecutor(2) as pool:
        a, f = pool.submit(end, 0), pool.submit(end, 1)
        with pytest.raises(ValueError, match="a0-f0: this end sends plain and receives plain, but the other sends and"):
            a.result()
        with pytest.raises(ValueError, match="this end sends plain and receives fp8, but the other sends and receives"):
            f.result()


@pytest.mark.parametrize("residual", ["standard", "parallel", "ladder", "ladder-parallel"])
def test_fp8_is_for_lag_0(residual: str, checkpoint: Path) -> None:
    spec = replace(ModelSpec.load(checkpoint), residual=residual)
    assert wire_to_ffn("plain", spec) is PLAIN
    if residual in ("standard", "parallel"):
        assert wire_to_ffn("fp8", spec) is FP8
    else:
        with pytest.raises(ValueError, match=f"fp8 wire is for checkpoints without ladder layers.*{residual}; use"):
            wire_to_ffn("fp8", spec)
    with pytest.raises(ValueError, match="is 'fp4'; it must be one of plain, fp8"):
        wire_to_ffn("fp4", spec)
