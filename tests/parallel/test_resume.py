"""An FFN pool that dies in the middle of a step, at every block: the next one goes on, with bitwise the same result."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.parallel.afd.edges import EdgeLost, GlooEdge, Header
from stepladder.parallel.afd.pool_link import BEGINNING, Layout, Link, Resume
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.balance import place_of
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.mesh import join
from stepladder.parallel.residual import Pending
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from tests.families import write_family
from tests.llama import write_llama
from tests.loopback import LoopbackEdge

WIRINGS: list[tuple[str, tuple[int, ...] | None]] = [
    ("standard", None),
    ("ladder", None),
    ("parallel", None),
    ("ladder-parallel", None),
    ("ladder", (1, 2)),
    ("ladder-parallel", (1, 2)),
]
LENGTHS = [5, 1, 7, 1]  # tokens of this step's sequences: prefill beside decode
DEADLINE = 20.0


@pytest.fixture(scope="module", params=["dense", "experts"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return write_llama(folder) if request.param == "dense" else write_family(folder, "qwen2-moe")


class Killed(Exception):
    """What happens to an F rank instead of the message after its last."""


@dataclass
class Dying:
    """F's end of an edge; dies when it has sent `messages`. What it sent before may still arrive."""

    edge: LoopbackEdge
    messages: int
    name: str = "dying"

    def send(self, header: Header, rows: Tensor) -> None:
        if not self.messages:
            self.edge.abort()
            raise Killed
        self.messages -= 1
        self.edge.send(header, rows)

    def receive(self, header: Header, hidden: int, dtype: torch.dtype) -> Pending:
        return self.edge.receive(header, hidden, dtype)

    def settle(self) -> None:
        self.edge.settle()

    def abort(self) -> None:
        self.edge.abort()


@dataclass
class Pools:
    """FFN pools of `size` ranks, in threads; the last rank of the n-th dies after `lives[n]` messages, if it is listed.

    Who dies leaves its group, which breaks the others in their reduce, and the whole pool is gone.
    """

    spec: ModelSpec
    path: Path
    tokens: tuple[int, ...]
    lives: Sequence[int]
    threads: ThreadPoolExecutor
    size: int = 1
    home: bool = False
    resumes: list[Resume] = field(default_factory=list)

    def open(self, resume: Resume = BEGINNING, lost: EdgeLost | None = None) -> tuple[list[GlooEdge], Layout]:
        life = len(self.resumes)
        self.resumes.append(resume)
        layout = Layout(life + 1, 10 * life, (self.tokens,), resume)
        store, pairs = dist.HashStore(), [LoopbackEdge.pair(f"life {life}, f{f}", DEADLINE) for f in range(self.size)]
        ends: list[GlooEdge] = [f for _, f in pairs]
        if life < len(self.lives):
            ends[-1] = Dying(pairs[-1][1], self.lives[life])
        for rank, end in enumerate(ends):
            self.threads.submit(self._serve, Shard(rank, self.size), end, layout, store)
        return [a for a, _ in pairs], layout

    @torch.inference_mode()
    def _serve(self, shard: Shard, edge: GlooEdge, layout: Layout, store: dist.Store) -> None:
        mesh = join(store, shard, timeout=timedelta(seconds=DEADLINE), ordered=True)
        place = place_of(self.spec, shard, whole_experts=self.home and self.spec.experts is not None, home=self.home)
        side = FeedForwardSide(self.spec, place, mesh.all_reduce, mesh)
        load_weights(side, self.path)
        try:
            side([edge], layout)
        except (Killed, RuntimeError):
            edge.abort()
        finally:
            mesh.close()


@torch.inference_mode()
def step(
    spec: ModelSpec, path: Path, micro: int, lives: Sequence[int], size: int = 1, home: bool = False
) -> tuple[list[Tensor], list[Resume]]:
    side = AttentionSide(spec)
    load_weights(side, path)
    draw, cache = torch.Generator().manual_seed(2), KVCache(spec, spec.num_kv_heads, 4 * len(LENGTHS), 4)
    cache.keys.normal_(generator=draw)
    cache.values.normal_(generator=draw)
    contexts, tokens = [], []
    for m in range(micro):
        mine = range(len(LENGTHS))[m::micro]
        lengths = [LENGTHS[i] for i in mine]
        tables = [list(range(4 * i, 4 * i + 4)) for i in mine]
        contexts.append(PagedSequences(cache, [3] * len(lengths), lengths, tables))
        tokens.append(torch.randint(0, spec.vocab_size, (sum(lengths),), generator=draw))
    with ThreadPoolExecutor(size * (len(lives) + 1)) as threads:
        pools = Pools(spec, path, tuple(map(len, tokens)), lives, threads, size, home)
        hidden = side(tokens, contexts, Link(*pools.open(), spec, pools.open, home=home))
    return hidden, pools.resumes[1:]


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_killed_at_every_message(wiring: tuple[str, tuple[int, ...] | None], micro: int, checkpoint: Path) -> None:
    """Bitwise equal, wherever it dies; and the next pool begins there, not at the step's beginning."""
    residual, layers = wiring
    spec = replace(ModelSpec.load(checkpoint), residual=residual, ladder_layers=layers)
    wanted, _ = step(spec, checkpoint, micro, [])
    begun = set()
    for messages in range(spec.num_layers * micro):
        got, resumes = step(spec, checkpoint, micro, [messages])
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), f"died after {messages} messages"
        assert len(resumes) == 1
        begun.add(resumes[0].first)
    assert len(begun) == spec.num_layers, "each layer's FFN was the first of some new pool"


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("residual", ["standard", "ladder", "ladder-parallel"])
def test_a_follower_is_killed_at_every_message(residual: str, micro: int, home: bool, checkpoint: Path) -> None:
    """One edge is lost first, the other when the first F rank's reduce or exchange breaks; both are made anew."""
    spec = replace(ModelSpec.load(checkpoint), residual=residual)
    wanted, _ = step(spec, checkpoint, micro, [], 2, home)
    for messages in range(spec.num_layers * micro):
        got, resumes = step(spec, checkpoint, micro, [messages], 2, home)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), f"died after {messages} messages"
        assert len(resumes) == 1


@pytest.mark.parametrize("residual", ["standard", "ladder", "ladder-parallel"])
def test_the_next_pool_dies_too(residual: str, checkpoint: Path) -> None:
    spec = replace(ModelSpec.load(checkpoint), residual=residual)
    wanted, _ = step(spec, checkpoint, 2, [])
    for lives in ([0, 0], [1, 0, 1], [2, 1], [3, 0, 0, 1]):
        got, resumes = step(spec, checkpoint, 2, lives)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)) and len(resumes) == len(lives)


def test_without_a_next_pool_the_loss_is_told(checkpoint: Path) -> None:
    spec = ModelSpec.load(checkpoint)

    def none(resume: Resume, lost: EdgeLost) -> tuple[list[GlooEdge], Layout]:
        raise lost

    a, f = LoopbackEdge.pair("a0-f0", DEADLINE)
    f.abort()
    side, cache = AttentionSide(spec), KVCache(spec, spec.num_kv_heads, 1, 4)
    load_weights(side, checkpoint)
    context = PagedSequences(cache, [0], [2], [[0]])
    with pytest.raises(EdgeLost, match="a0-f0: the peer gave up"), torch.inference_mode():
        side([torch.tensor([1, 2])], [context], Link([a], Layout(1, 0, ((2,),)), spec, none))


def test_a_lost_attention_rank_is_not_waited_for(checkpoint: Path) -> None:
    """It dies in the middle of a step; the other's rows are what they would have been alone."""
    spec = ModelSpec.load(checkpoint)
    whole = AttentionSide(spec)
    load_weights(whole, checkpoint)
    feed = FeedForwardSide(spec)
    load_weights(feed, checkpoint)
    layout = Layout(1, 0, ((3,), (2,)))
    pairs = [LoopbackEdge.pair(f"a{i}-f0", DEADLINE) for i in range(2)]
    lost: list[set[int]] = []

    def serve() -> None:
        with torch.inference_mode():
            lost.append(feed([f for _, f in pairs], layout))

    def live() -> Tensor:
        cache = KVCache(spec, spec.num_kv_heads, 1, 4)
        link = Link([pairs[0][0]], replace(layout, tokens=((3,),)), spec)
        with torch.inference_mode():
            return whole([torch.tensor([5, 6, 7])], [PagedSequences(cache, [0], [3], [[0]])], link)[0]

    def die() -> None:
        a = pairs[1][0]
        a.send(layout.header(-1, 0, 1), torch.randn(2, spec.hidden_size))
        a.send(layout.header(0, 0, 1), torch.randn(2, spec.hidden_size))
        a.abort()

    threads = [threading.Thread(target=target) for target in (serve, die)]
    for thread in threads:
        thread.start()
    got = live()
    for thread in threads:
        thread.join()
    assert lost == [{1}]
    alone = step_alone(spec, checkpoint)
    assert (got - alone).abs().max() <= 1e-5 * alone.abs().max()


@torch.inference_mode()
def step_alone(spec: ModelSpec, path: Path) -> Tensor:
    from stepladder.parallel.model import Transformer

    model = Transformer(spec)
    load_weights(model, path)
    cache = KVCache(spec, spec.num_kv_heads, 1, 4)
    return model(torch.tensor([5, 6, 7]), PagedSequences(cache, [0], [3], [[0]]))
