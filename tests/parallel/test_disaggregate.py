"""Attention and FFN on different ranks equal the whole model: every ratio, schedule and wiring, and the same tokens."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.parallel.afd.edges import EdgeLost, GlooEdge, Header
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.balance import place_of
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.mesh import Mesh, join
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from tests.families import write_family
from tests.llama import write_llama
from tests.loopback import LoopbackEdge

RATIOS = [(1, 1), (2, 1), (1, 2), (3, 2), (2, 2)]
WIRINGS: list[tuple[str, tuple[int, ...] | None]] = [
    ("standard", None),
    ("ladder", None),
    ("parallel", None),
    ("ladder-parallel", None),
    ("ladder", (1, 2)),
    ("ladder-parallel", (1,)),
]
BLOCK, BLOCKS = 4, 24  # KV blocks of a sequence: tokens each, how many


class Checkpoint(NamedTuple):
    """whole_experts: F ranks hold whole experts. home: rows live on one F rank each. bound: of errors over the largest
    logit; routers amplify roundings."""

    path: Path
    whole_experts: bool = False
    home: bool = False
    bound: float = 1e-5


@pytest.fixture(scope="module", params=["dense", "split", "whole", "dense-home", "split-home", "whole-home"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A dense model, and one with experts that F ranks have a part of, or some of."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, _, home = request.param.partition("-")
    if kind == "dense":
        return Checkpoint(write_llama(folder), home=bool(home))
    return Checkpoint(write_family(folder, "qwen2-moe"), kind == "whole", bool(home), 5e-5)


@dataclass
class Batch:
    """The sequences of one A rank, in micro-batches: prompts[micro][sequence]."""

    prompts: list[list[list[int]]]

    def contexts(self, cache: KVCache, lengths: list[list[list[int]]]) -> list[PagedSequences]:
        """lengths[micro][sequence] = [tokens before, tokens now]."""
        made, number = [], 0
        for micro in lengths:
            tables = [list(range((number + i) * BLOCKS, (number + i + 1) * BLOCKS)) for i in range(len(micro))]
            number += len(micro)
            made.append(PagedSequences(cache, [a for a, _ in micro], [b for _, b in micro], tables))
        return made


Step = Callable[[list[Tensor], list[PagedSequences], int], list[Tensor]]


@torch.inference_mode()
def decode(batch: Batch, spec: ModelSpec, cache: KVCache, step: Step, logits: Any, steps: int) -> list[list[Tensor]]:
    """Prefill and greedy decode; [step][micro] logits of every row."""
    now = [[list(prompt) for prompt in micro] for micro in batch.prompts]
    before = [[0 for _ in micro] for micro in now]
    results = []
    for number in range(steps):
        lengths = [[[b, len(n)] for b, n in zip(*pair, strict=True)] for pair in zip(before, now, strict=True)]
        tokens = [torch.tensor([t for n in micro for t in n], dtype=torch.int64) for micro in now]
        hidden = step(tokens, batch.contexts(cache, lengths), number)
        results.append([logits(h) for h in hidden])
        for m, micro in enumerate(now):
            ends = torch.tensor([len(n) for n in micro]).cumsum(0) - 1
            drawn = results[-1][m][ends].argmax(-1).tolist() if micro else []
            before[m] = [b + len(n) for b, n in zip(before[m], micro, strict=True)]
            now[m] = [[t] for t in drawn]
    return results


def alone(spec: ModelSpec, path: Path, batch: Batch, steps: int) -> list[list[Tensor]]:
    """The whole model, micro-batch by micro-batch."""
    model = Transformer(spec)
    load_weights(model, path)
    cache = cache_of(spec, batch)

    def step(tokens: list[Tensor], contexts: list[PagedSequences], number: int) -> list[Tensor]:
        return [
            model(t, c) if len(t) else torch.empty(0, spec.hidden_size) for t, c in zip(tokens, contexts, strict=True)
        ]

    return decode(batch, spec, cache, step, model.logits, steps)


def cache_of(spec: ModelSpec, batch: Batch) -> KVCache:
    return KVCache(spec, spec.num_kv_heads, BLOCKS * max(1, sum(map(len, batch.prompts))), BLOCK)


def layouts(batches: Sequence[Batch], steps: int) -> list[Layout]:
    first = tuple(tuple(sum(map(len, micro)) for micro in batch.prompts) for batch in batches)
    then = tuple(tuple(len(micro) for micro in batch.prompts) for batch in batches)
    return [Layout(7, number, then if number else first) for number in range(steps)]


def apart(
    spec: ModelSpec, checkpoint: Checkpoint, batches: Sequence[Batch], num_f: int, steps: int, edges: str = "gloo"
) -> list[list[list[Tensor]]]:
    """[A rank][step][micro] logits; every rank a thread with real groups."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    done = threading.Barrier(len(batches) + num_f)
    plans, loops = layouts(batches, steps), {}
    if edges == "loopback":
        loops = {(a, f): LoopbackEdge.pair(f"a{a}-f{f}") for a in range(len(batches)) for f in range(num_f)}

    def joined() -> dist.TCPStore:
        return dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)

    def edge(store: dist.Store, a: int, f: int, end: int) -> GlooEdge:
        if loops:
            return loops[a, f][end]
        return GlooEdge(store, f"a{a}-f{f}", end, deadline=timedelta(seconds=20))

    def attention(a: int) -> list[list[Tensor]]:
        side = AttentionSide(spec)
        load_weights(side, checkpoint.path)
        store = joined()
        mine = [edge(store, a, f, 0) for f in range(num_f)]
        cache = cache_of(spec, batches[a])

        def step(tokens: list[Tensor], contexts: list[PagedSequences], number: int) -> list[Tensor]:
            layout = replace(plans[number], tokens=plans[number].tokens[a : a + 1])
            return side(tokens, contexts, Link(mine, layout, spec, home=checkpoint.home))

        result = decode(batches[a], spec, cache, step, side.logits, steps)
        done.wait()
        return result

    def feed_forward(f: int) -> None:
        store = joined()
        mesh: Mesh = join(dist.PrefixStore("f", store), Shard(f, num_f), ordered=True)
        place = place_of(spec, mesh.shard, whole_experts=checkpoint.whole_experts, home=checkpoint.home)
        side = FeedForwardSide(spec, place, mesh.all_reduce, mesh)
        load_weights(side, checkpoint.path)
        mine = [edge(store, a, f, 1) for a in range(len(batches))]
        with torch.inference_mode():
            for plan in plans:
                assert side(mine, plan) == set()
        done.wait()
        mesh.close()

    with ThreadPoolExecutor(len(batches) + num_f) as pool:
        ffns = [pool.submit(feed_forward, f) for f in range(num_f)]
        attentions = [pool.submit(attention, a) for a in range(len(batches))]
        for ffn in ffns:
            ffn.result()
        return [a.result() for a in attentions]


def prompts(draw: torch.Generator, counts: Sequence[int], micro: int) -> Batch:
    """`counts` sequences go to the micro-batches in turn."""
    made: list[list[list[int]]] = [[] for _ in range(micro)]
    for index, length in enumerate(counts):
        made[index % micro].append(torch.randint(0, 101, (length,), generator=draw).tolist())
    return Batch(made)


def check(
    spec: ModelSpec, checkpoint: Checkpoint, batches: Sequence[Batch], num_f: int, steps: int, edges: str = "gloo"
) -> None:
    got = apart(spec, checkpoint, batches, num_f, steps, edges)
    for batch, mine in zip(batches, got, strict=True):
        want = alone(spec, checkpoint.path, batch, steps)
        for a, b in zip(mine, want, strict=True):
            for logits, wanted in zip(a, b, strict=True):
                assert logits.shape == wanted.shape
                if len(wanted):
                    assert (logits - wanted).abs().max() <= checkpoint.bound * wanted.abs().max()
                    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
@pytest.mark.parametrize("ratio", RATIOS, ids=lambda r: f"{r[0]}A{r[1]}F")
def test_every_ratio_and_wiring(ratio: tuple[int, int], wiring: tuple[str, Any], checkpoint: Checkpoint) -> None:
    """Unequal batches in two micro-batches, an A rank without a token where there are three."""
    residual, layers = wiring
    spec = replace(ModelSpec.load(checkpoint.path), residual=residual, ladder_layers=layers)
    draw = torch.Generator().manual_seed(3)
    counts = [[5, 9, 3], [7], []][: ratio[0]]
    check(spec, checkpoint, [prompts(draw, c, 2) for c in counts], ratio[1], steps=3)


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_micro_batches_in_rotation(residual: str, micro: int, checkpoint: Checkpoint) -> None:
    """Also more micro-batches than sequences."""
    spec = replace(ModelSpec.load(checkpoint.path), residual=residual)
    draw = torch.Generator().manual_seed(4)
    check(spec, checkpoint, [prompts(draw, [4, 8, 2], micro), prompts(draw, [6], micro)], 1, steps=3)


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_64_greedy_tokens_are_identical(residual: str, checkpoint: Checkpoint) -> None:
    spec = replace(ModelSpec.load(checkpoint.path), residual=residual)
    draw = torch.Generator().manual_seed(5)
    check(spec, checkpoint, [prompts(draw, [5, 11], 2), prompts(draw, [3], 2)], 2, steps=64, edges="loopback")


def test_a_side_holds_only_its_own_weights(checkpoint: Checkpoint) -> None:
    spec = ModelSpec.load(checkpoint.path)
    sizes = [sum(p.numel() for p in side.parameters()) for side in (AttentionSide(spec), FeedForwardSide(spec))]
    names = "gate_up", "down", "router"
    ffn = sum(p.numel() for name, p in Transformer(spec).named_parameters() if any(one in name for one in names))
    assert sum(sizes) == sum(p.numel() for p in Transformer(spec).parameters())
    assert ffn <= sizes[1] <= ffn + spec.num_layers * spec.hidden_size


def pair(kind: str, deadline: float) -> tuple[GlooEdge, GlooEdge]:
    if kind == "loopback":
        return LoopbackEdge.pair("a0-f0", deadline)
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        a, f = pool.map(lambda end: GlooEdge(stores[end], "a0-f0", end, deadline=timedelta(seconds=deadline)), range(2))
    return a, f


@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_messages_arrive_in_order_whole_and_under_their_headers(kind: str) -> None:
    a, f = pair(kind, 10)
    headers = [Header(1, 2, block, 0, rows) for block, rows in enumerate([3, 1, 200])]
    sent = [torch.randn(h.tokens, 16).to(torch.bfloat16) for h in headers]
    pending = [f.receive(h, 16, torch.bfloat16) for h in headers]
    for header, rows in zip(headers, sent, strict=True):
        kept = rows.clone()
        a.send(header, kept)
        kept.zero_()  # it was copied
    assert all(torch.equal(p.wait(), rows) for p, rows in zip(pending, sent, strict=True))
    a.settle()


@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_what_was_not_expected_is_refused(kind: str) -> None:
    a, f = pair(kind, 10)
    pending = f.receive(Header(1, 2, 5, 0, 1), 4, torch.float32)
    a.send(Header(1, 2, 6, 0, 1), torch.ones(1, 4))
    with pytest.raises(EdgeLost, match=r"a0-f0: expected step 2, block 5.*got step 2, block 6"):
        pending.wait()


@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_a_silent_peer_is_named_with_the_last_header_that_came(kind: str) -> None:
    a, f = pair(kind, 0.3)
    a.send(Header(1, 8, 3, 0, 1), torch.ones(1, 4))
    f.receive(Header(1, 8, 3, 0, 1), 4, torch.float32).wait()
    with pytest.raises(EdgeLost, match=r"edge a0-f0: nothing came for step 8, block 4.*the last was step 8, block 3"):
        f.receive(Header(1, 8, 4, 0, 1), 4, torch.float32).wait()


@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_a_peer_that_gives_up_says_so(kind: str) -> None:
    a, f = pair(kind, 10)
    pending = f.receive(Header(1, 8, 4, 0, 3), 4, torch.float32)
    a.abort()
    with pytest.raises(EdgeLost, match="the peer gave up"):
        pending.wait()
