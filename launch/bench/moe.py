"""suite=moe: the experts of a layer on one thread of a CPU rank, beside transformers' eager, grouped_mm and batched_mm,
and F.grouped_mm alone. All get the same rows, routed alike, and take turns; what counts is CPU time of the process.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stepladder.kernels.cpu.experts import Experts
from stepladder.kernels.moe import route
from stepladder.launch.report import Goal, Report, Row, at_most
from stepladder.launch.typed_config import check_counts

OURS, EAGER, GROUPED, BATCHED, BARE = "ours", "eager", "grouped_mm", "batched_mm", "F.grouped_mm"
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest number; theirs round between their products
Way = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class MoeBench:
    """Options.

    Attributes:
        shapes: hidden size, inner size, experts, experts per token. tokens: rows of a step. dtypes: of everything.
        batched_below: tokens up to which batched_mm is measured. repeats: turns of everybody.
    """

    name: str
    run_dir: str
    shapes: list[list[int]]
    tokens: list[int]
    dtypes: list[str]
    batched_below: int
    repeats: int

    def __post_init__(self) -> None:
        check_counts(self, "repeats")
        for shape in self.shapes:
            if len(shape) != 4 or min(shape) < 1 or shape[3] > shape[2]:
                raise ValueError(f"shapes has {shape}; each is hidden, inner, experts and experts per token")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens is {self.tokens}; each must be at least 1")
        if bad := set(self.dtypes) - {"float32", "bfloat16"}:
            raise ValueError(f"dtypes has {min(bad)}; each must be float32 or bfloat16")


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    tokens: int

    @property
    def name(self) -> str:
        hidden, inner, count, per_token = self.shape
        return f"H {hidden} I {inner} E {count} k {per_token}, {self.dtype}, {self.tokens} tokens"


Times = Mapping[str, float]  # seconds by way


def run(config: MoeBench) -> Report:
    """ValueError without transformers."""
    if find_spec("transformers") is None:
        raise ValueError("suite=moe compares with transformers, which is not installed here; pip install '.[test]'")
    torch.set_num_threads(1)
    cases = [
        Case(tuple(shape), dtype, tokens)
        for shape in config.shapes
        for dtype in config.dtypes
        for tokens in config.tokens
    ]
    found = {case: times_of(case, config) for case in tqdm(cases, unit="case")}
    return report(found)


@torch.inference_mode()
def times_of(case: Case, config: MoeBench) -> Times:
    """Median CPU seconds of each way; AssertionError if one computes something else."""
    ways = _ways(case, case.tokens <= config.batched_below)
    wanted = ways[EAGER]().float()
    for name, way in ways.items():
        error = float((way().float() - wanted).abs().max() / wanted.abs().max())
        assert error <= CLOSE[getattr(torch, case.dtype)], f"{name} of {case.name} is off by {error:.1e}"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, way in ways.items():
            began = process_time()
            way()
            times[name].append(process_time() - began)
    return {name: median(taken) for name, taken in times.items()}


def _ways(case: Case, batched: bool) -> dict[str, Way]:
    hidden, inner, count, per_token = case.shape
    draw, dtype = torch.Generator().manual_seed(case.tokens), getattr(torch, case.dtype)
    gate_up = (torch.randn(count, 2 * inner, hidden, generator=draw) * hidden**-0.5).to(dtype)
    down = (torch.randn(count, hidden, inner, generator=draw) * inner**-0.5).to(dtype)
    x = torch.randn(case.tokens, hidden, generator=draw).to(dtype)
    weights, chosen = route(torch.randn(case.tokens, count, generator=draw), per_token, True)
    ours = Experts.of(gate_up.flatten(0, 1), down.flatten(0, 1), count)
    ways: dict[str, Way] = {OURS: lambda: ours(x, weights, chosen).to(dtype)}
    for name in (EAGER, GROUPED, *([BATCHED] if batched else [])):
        theirs = _of_transformers(name, gate_up, down)
        ways[name] = lambda theirs=theirs: theirs(x, chosen, weights.to(dtype))  # type: ignore[misc]
    ways[BARE] = lambda: _grouped(x, weights, chosen, gate_up, down)
    return ways


def _of_transformers(name: str, gate_up: Tensor, down: Tensor) -> Any:
    """Its module for Qwen3-MoE's experts."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    count, hidden, inner = down.shape
    config = Qwen3MoeConfig(num_experts=count, hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = name
    module = Qwen3MoeExperts(config).to(gate_up.dtype).eval()
    module.gate_up_proj.data, module.down_proj.data = gate_up, down
    return module


def _grouped(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The pairs of a token and an expert, sorted, through two grouped products and back."""
    order = chosen.flatten().argsort(stable=True)
    ends = chosen.flatten().bincount(minlength=len(down)).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // chosen.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    results = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(results).index_copy_(0, order, results)
    return (back.view(*chosen.shape, -1) * weights[..., None]).sum(1).to(x.dtype)


def report(found: Mapping[Case, Times]) -> Report:
    rows = [
        Row(case.name, f"{name}, CPU time", seconds * 1e6, "us", rival=times[GROUPED] * 1e6)
        for case, times in found.items()
        for name, seconds in times.items()
    ]
    return Report("moe", rows, dict(_summary(found)), draw=lambda figure: _draw(figure, found))


def _summary(found: Mapping[Case, Times]) -> Iterator[tuple[str, Goal]]:
    beside = {case: times[OURS] / times[GROUPED] for case, times in found.items()}
    mean = math.exp(sum(map(math.log, beside.values())) / len(beside))
    worst = max(beside, key=beside.__getitem__)
    yield "ours over grouped_mm, geometric mean", at_most(mean, 1.05)
    yield f"the same, worst: {worst.name}", at_most(beside[worst], 1.4)
    eager = {case: times[OURS] / times[EAGER] for case, times in found.items()}
    slowest = max(eager, key=eager.__getitem__)
    yield f"ours over eager, worst: {slowest.name}", at_most(eager[slowest], 1.1)


def _draw(figure: Any, found: Mapping[Case, Times]) -> None:
    """A panel per shape and dtype: everybody's time over grouped_mm's."""
    kinds: Sequence[tuple[Any, str]] = list(dict.fromkeys((case.shape, case.dtype) for case in found))
    figure.set_size_inches(4.2 * len(kinds), 3.4)
    for axes, (shape, dtype) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        mine = {case: times for case, times in found.items() if (case.shape, case.dtype) == (shape, dtype)}
        for name in (OURS, EAGER, BATCHED, BARE):
            points = [(c.tokens, times[name] / times[GROUPED]) for c, times in mine.items() if name in times]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name, lw=2 if name == OURS else 1)
        axes.axhline(1.0, color="black", lw=0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_title(f"H {shape[0]} I {shape[1]} E {shape[2]} k {shape[3]}, {dtype}", fontsize="small")
        axes.set_xlabel("tokens")
        axes.set_ylabel("CPU time over grouped_mm's")
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)


SUITE = MoeBench, run
