"""The loop and the edges as they are, with modules that sleep and transfers that come late. Emulated, and said so.

A and F ranks are threads of one process with gloo edges between them; sleeping takes no CPU, so that two cores can play
any number of ranks.
"""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.launch.bench.afd.formula import Times
from stepladder.launch.bench.rig.spans import Recorder, Span, Window, busy, computing, exposed
from stepladder.parallel.afd.edges import GlooEdge, Header
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.rendezvous import open_store
from stepladder.parallel.residual import Block
from stepladder.parallel.spec import ModelSpec

ROWS = 4  # of a micro-batch
DEADLINE = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Case:
    """lag: of all blocks. attention, ffn: how many ranks."""

    times: Times
    lag: int
    micro_batches: int
    attention: int = 1
    ffn: int = 1

    @property
    def name(self) -> str:
        names = ("attention", "ffn", "transfer", "reduce")
        ms = " ".join(f"{name}={getattr(self.times, name) * 1e3:g}" for name in names)
        schedule = "ladder" if self.lag else f"ping-pong m={self.micro_batches}"
        return f"{self.attention}A{self.ffn}F {schedule}: {ms} ms"


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, by step; attention_busy, ffn_busy: the share in which the first rank of the pool computed;
    exposed: seconds of a step in which no rank did."""

    steps: list[float]
    attention_busy: float
    ffn_busy: float
    exposed: float


class LateEdge(GlooEdge):
    """Every message sets out `late` seconds after it was given; several may be on their way at once.

    A thread of its own sends them. With `rig.late.LateWire` the modules' own would, and a layer take 1% longer.
    """

    def __init__(self, late: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late = late
        self._leaving: queue.Queue[tuple[float, Header, Tensor] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, header: Header, rows: Tensor) -> None:
        self._leaving.put((time.perf_counter() + self._late, header, rows.clone()))

    def settle(self) -> None:
        self._leaving.join()
        super().settle()

    def close(self) -> None:
        """Nothing more will be sent."""
        self._leaving.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (message := self._leaving.get()) is not None:
            due, header, rows = message
            time.sleep(max(0.0, due - time.perf_counter()))
            super().send(header, rows)
            self._leaving.task_done()


class LateReduce:
    """A reduce of the F pool: there `seconds` after it was issued."""

    def __init__(self, tensor: Tensor, seconds: float) -> None:
        self._tensor, self._due = tensor, time.perf_counter() + seconds

    def wait(self) -> Tensor:
        time.sleep(max(0.0, self._due - time.perf_counter()))
        return self._tensor


def measure(case: Case, layers: int, steps: int) -> Measured:
    """`steps` decode steps, after one that warms up."""
    spec = _spec(layers, case.lag)
    server = open_store("127.0.0.1")
    tokens = tuple((ROWS,) * case.micro_batches for _ in range(case.attention))
    layouts = [Layout(0, number, tokens) for number in range(steps + 1)]

    def edges(end: int, mine: int, others: int) -> list[LateEdge]:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        pairs = [(other, mine) if end else (mine, other) for other in range(others)]
        return [LateEdge(case.times.transfer, store, f"a{a}-f{f}", end, deadline=DEADLINE) for a, f in pairs]

    def attention(rank: int) -> tuple[list[Window], list[Span]]:
        side, record = AttentionSide(spec), Recorder()
        side.blocks, mine = _sleeping(side.blocks, case.times.attention, record), edges(0, rank, case.ffn)
        windows = list[Window]()
        for layout in layouts:
            inputs = [torch.zeros(ROWS, dtype=torch.int64)] * case.micro_batches
            began = time.perf_counter()
            link = Link(mine, replace(layout, tokens=layout.tokens[rank : rank + 1]), spec)
            side(inputs, [WholeSequences(ROWS, 1)] * case.micro_batches, link)
            windows.append((began, time.perf_counter()))
        for edge in mine:
            edge.close()
        return windows[1:], record.spans

    def ffn(rank: int) -> list[Span]:
        record = Recorder()
        side = FeedForwardSide(spec, reduce=lambda partial: LateReduce(partial, case.times.reduce))
        side.blocks, mine = _sleeping(side.blocks, case.times.ffn, record), edges(1, rank, case.attention)
        for layout in layouts:
            lost = side(mine, layout)
            assert not lost, "an A rank is a thread of this process"
        for edge in mine:
            edge.close()
        return record.spans

    with torch.inference_mode(), ThreadPoolExecutor(case.attention + case.ffn) as pool:
        ffns = [pool.submit(ffn, rank) for rank in range(case.ffn)]
        attentions = [pool.submit(attention, rank) for rank in range(case.attention)]
        windows, here = zip(*(future.result() for future in attentions), strict=True)
        there = [future.result() for future in ffns]
    seconds = [end - begin for begin, end in windows[0]]
    shares = busy(here[0], windows[0]), busy(there[0], windows[0])  # of the first rank of each pool
    return Measured(seconds, *shares, exposed([*chain(*here, *there)], windows[0]))


def _sleeping(blocks: Sequence[Block], seconds: float, record: Recorder) -> list[Block]:
    """The blocks with modules that take a time and add nothing, recorded."""

    def module(x: Tensor, context: Any) -> Tensor:
        time.sleep(seconds)
        return torch.zeros_like(x)

    return [record.block(computing(block, module, block.lag), block.name, block.lag) for block in blocks]


def _spec(layers: int, lag: int) -> ModelSpec:
    return ModelSpec(
        vocab_size=8, hidden_size=64, intermediate_size=64, num_layers=layers, num_heads=1, num_kv_heads=1, head_dim=64,
        max_position=8, tie_embeddings=True, residual="ladder" if lag else "standard",
    )  # fmt: skip
