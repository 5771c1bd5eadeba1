"""One step of each variant on one rank, over the same weights: only the order of blocks and reduces differs."""

import random
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from stepladder.launch.bench.overlap.task import BOUND, VARIANTS, WIRINGS, Case
from stepladder.launch.bench.rig.meeting import meet, settle
from stepladder.parallel.balance import balanced
from stepladder.parallel.context import PagedSequences
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.native import choose
from stepladder.parallel.residual import Block, Done, Reduce
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import SEATS, wiring

BLOCK_SIZE = 16


def random_model(spec: ModelSpec, mesh: Mesh, balance: bool = False) -> Transformer:
    """This rank's shard of a model that was never trained. balance: with shares of a ladder."""
    if balance:
        spec = replace(spec, residual="ladder")
    placement = balanced(spec, mesh.shard) if balance else mesh.shard
    with torch.device(mesh.device):
        model = Transformer(spec, placement, mesh.all_reduce).requires_grad_(False)
    init_weights(model, spec, seed=mesh.shard.rank)
    choose(model)
    return model


def rewired(model: Transformer, residual: str) -> list[Block]:
    """The modules of `model`, standard, as the blocks of another wiring."""
    plans = wiring(model.spec)
    modules = {(p.layer, name): m for p, m in zip(plans, model.modules_of_blocks, strict=True) for name in p.seats}
    other = wiring(replace(model.spec, residual=residual))
    return [Block(p.lag, [modules[p.layer, seat] for seat in p.seats], (), p.layer, p.seats) for p in other]


class Steps:
    """The steps of one case. On CUDA, decode is captured in a graph per variant; elsewhere it runs as it is."""

    def __init__(self, model: Transformer, mesh: Mesh, case: Case) -> None:
        self.model, self.mesh, self.case = model, mesh, case
        self.blocks = {name: rewired(model, name) for name in WIRINGS}
        self.blocks[BOUND] = self.blocks["standard"]
        width = -(-(case.context + case.length) // BLOCK_SIZE)
        self.cache = model.cache(case.batch * width, BLOCK_SIZE)
        self._tables = [list(range(i * width, (i + 1) * width)) for i in range(case.batch)]
        draw = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(0, model.spec.vocab_size, (case.tokens,), generator=draw).to(mesh.device)
        captured = mesh.device.type == "cuda" and case.length == 1
        self._run = {name: self._captured(name) if captured else self._eager(name) for name in VARIANTS}

    def __call__(self, variant: str) -> float:
        """Seconds of one step, from a moment that all ranks share to this rank's last result."""
        meet(self.mesh)
        began = perf_counter()
        self._run[variant]()
        settle(self.mesh)
        return perf_counter() - began

    def run_eagerly(self, blocks: list[Block], reduce: Reduce) -> Tensor:
        """A step with these blocks and this reduce instead of a variant's own."""
        self.model.blocks, self.model.reduce = blocks, reduce
        return self.model(self._tokens, self._context())

    def blocks_alone(self) -> dict[str, float]:
        """Seconds of compute of an attention block and of a feed-forward block, without communication."""
        x = torch.randn(self.case.tokens, self.model.spec.hidden_size, device=self.mesh.device).to(
            self.model.spec.dtype
        )
        context = self._context()
        self.model(self._tokens, context)  # sets the context's rotary tables
        seconds: dict[str, list[float]] = {seat: [] for seat in SEATS}
        for block in self.blocks[BOUND]:
            (seat,) = block.seats
            settle(self.mesh)
            began = perf_counter()
            block(x, context)
            settle(self.mesh)
            seconds[seat].append(perf_counter() - began)
        return {name: sum(each) / len(each) for name, each in seconds.items()}

    def _eager(self, variant: str) -> Callable[[], object]:
        reduce = Done if variant == BOUND else self.mesh.all_reduce
        return lambda: self.run_eagerly(self.blocks[variant], reduce)

    def _captured(self, variant: str) -> Callable[[], object]:
        step, graph, side = self._eager(variant), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels and communicators set themselves up, which cannot be captured
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        context = self._context()
        context.groups()  # built on the host, before the capture
        with torch.cuda.graph(graph):
            self.model(self._tokens, context)  # with the blocks and the reduce of the steps just run
        return graph.replay

    def _context(self) -> PagedSequences:
        starts, lengths = [self.case.context] * self.case.batch, [self.case.length] * self.case.batch
        return PagedSequences(self.cache, starts, lengths, self._tables)


def orders(rounds: int) -> list[list[str]]:
    """The variants in a new order for every round, the same on every rank."""
    draw = random.Random(0)
    return [draw.sample(VARIANTS, len(VARIANTS)) for _ in range(rounds)]
