"""suite=overlap: four wirings and the same work without communication, over links of several speeds.

All variants run the same shapes, weights and steps, in turns, on two ranks: on the CPU two processes on two hosts made
of network namespaces, with gloo over a shaped link; with two GPUs two processes with NCCL, decode in a CUDA graph.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from math import log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm

from stepladder.launch.bench.overlap.bound import Parts, shortest_step
from stepladder.launch.bench.overlap.figure import draw
from stepladder.launch.bench.overlap.task import BOUND, VARIANTS, WIRINGS, Answer, Case, Shapes, Task
from stepladder.launch.bench.overlap.trace import hidden_share, perfetto, under_the_next_block
from stepladder.launch.bench.rig import hosts as rig
from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.hosts import Hosts
from stepladder.launch.bench.rig.paired import Ratio, paired_ratio
from stepladder.launch.bench.rig.perfetto import write_trace
from stepladder.launch.bench.rig.processes import Ranks, Start
from stepladder.launch.report import Goal, Report, Row, at_least, at_most
from stepladder.launch.typed_config import check_counts

RANKS = 2
PROCESS = "stepladder.launch.bench.overlap.rank"
NEAR = (0.7, 1.4)  # a reduce takes about one module's compute
FEW, OFTEN = 16, 3  # steps of fewer tokens are short, so that noise weighs more: so many times the rounds
LONG = 1e-3  # seconds of a reduce that is not mostly the taking of time stamps


class Wire(rig.Wire):
    """late_ms: added to every reduce."""

    @property
    def name(self) -> str:
        speed = "unshaped" if self.rate is None else f"{self.rate:g} Mbit/s"
        return speed + (f" + {self.late_ms:g} ms (emulated)" if self.late_ms else "")


@dataclass(frozen=True, kw_only=True)
class OverlapBench:
    """device: cpu, cuda, or null for cuda where there are two GPUs. wires: the links to try, CPU only. batches: of
    decode, behind `context` tokens each. prefill: tokens of one prompt. rounds: of every case; three times as many
    where a step has fewer than 16 tokens. trace: where to write a Perfetto trace, CPU only.
    """

    name: str
    run_dir: str
    device: str | None
    shapes: Shapes
    wires: list[Wire]
    batches: list[int]
    context: int
    prefill: int
    rounds: int
    threads: int = 1
    trace: str | None = None

    def __post_init__(self) -> None:
        check_counts(self, "context", "prefill", "rounds", "threads")
        if self.prefill == 1:
            raise ValueError("prefill is 1, which is a decode step; it must be at least 2")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be cpu, cuda or null")
        if self.device == "cuda" and torch.cuda.device_count() < RANKS:
            raise ValueError(f"device is cuda, but this machine has {torch.cuda.device_count()} GPUs; it takes {RANKS}")
        if self.cuda and self.trace:
            raise ValueError("trace is for CPU ranks; on CUDA use torch.profiler or Nsight Systems")
        if self.trace and Path(self.trace).is_dir():
            raise ValueError(f"trace is {self.trace}, a directory; name a file")
        if not self.batches or not self.wires or min(self.batches) < 1:
            raise ValueError("batches and wires must not be empty, and every batch at least 1")

    @property
    def cuda(self) -> bool:
        return self.device == "cuda" or (self.device is None and torch.cuda.device_count() >= RANKS)

    @property
    def cases(self) -> list[Case]:
        return [*(Case(batch, 1, self.context) for batch in self.batches), Case(1, self.prefill, 0)]

    @property
    def starts(self) -> list[Start[Shapes]]:
        devices = [f"cuda:{rank}" if self.cuda else "cpu" for rank in range(RANKS)]
        return [Start(self.shapes, device, self.threads) for device in devices]

    def task(self, case: Case, wire: Wire) -> Task:
        return Task(case, self.rounds * (OFTEN if case.tokens < FEW else 1), wire.late_ms / 1e3)


@dataclass(frozen=True)
class Point:
    """One case over one link. steps: seconds by variant and round, of the slower rank."""

    wire: Wire
    case: Case
    steps: dict[str, list[float]]
    parts: Parts
    answers: list[Answer]
    ratios: dict[str, Ratio]

    @property
    def name(self) -> str:
        return f"{self.wire.name}, {self.case.name}"

    @property
    def weight(self) -> float:
        """A reduce's time over the mean module's."""
        return 2 * self.parts.reduce / (self.parts.attention + self.parts.ffn)

    @property
    def in_a_burst(self) -> bool:
        """Whether a tenth of a lone reduce or more passes at once, as a token bucket allows after a silence. Then a
        reduce takes longer where another one went before, as under ladder, than where the link had rested, as under
        standard, and `weight` says too little."""
        return self.wire.rate is not None and self.parts.spacing > 1.1 * self.parts.reduce

    def hidden(self, variant: str) -> dict[str, float]:
        """By the ranks' counters and by their traces, means of the ranks; nothing without communication, or on CUDA."""
        if variant not in self.answers[0].hidden:
            return {}
        traced = [hidden_share(chain.from_iterable(answer.spans[variant])) for answer in self.answers]
        return {"counters": fmean(answer.hidden[variant] for answer in self.answers), "trace": fmean(traced)}


def run(config: OverlapBench) -> Report:
    """Raises ValueError where neither two GPUs nor network namespaces are to be had."""
    wires = [Wire()] if config.cuda else config.wires
    if config.cuda:
        print("NCCL over the links as they are: `wires` are for CPU ranks")
    points = []
    with ExitStack() as stack:
        hosts = None if config.cuda else stack.enter_context(_hosts())
        ranks = stack.enter_context(Ranks(PROCESS, config.starts, hosts))
        bar = stack.enter_context(tqdm(total=len(wires) * len(config.cases), unit="case"))
        for wire in wires:
            for host in hosts or ():
                host.shape(wire)
            for case in config.cases:
                bar.set_postfix_str(f"{wire.name}, {case.name}")
                points.append(_point(wire, case, ranks.ask(config.task(case, wire), Answer), config))
                bar.update()
    if config.trace:
        _write_trace(points, Path(config.trace).absolute())
    emulated = None if config.cuda else "link rates by tc-tbf between namespaces of one machine, latency by waiting"
    told = [_plain(point) for point in points]
    rows = [row for point, plain in zip(points, told, strict=True) for row in _rows(point.name, plain["variants"])]
    details = {"points": {"points": told}}
    return Report("overlap", rows, _summary(points), emulated, details, lambda figure: draw(figure, points))


def _hosts() -> Hosts:
    if why := netns.unavailable():
        raise ValueError(f"suite=overlap needs two GPUs or network namespaces; {why}")
    return Hosts(RANKS)


def _point(wire: Wire, case: Case, answers: list[Answer], config: OverlapBench) -> Point:
    steps = {name: _slower(answer.steps[name] for answer in answers) for name in VARIANTS}
    attention, ffn = (max(a.blocks[name] for a in answers) for name in ("attention", "ffn"))
    lone, pair, cpu = (median(_slower(times)) for times in (
        [a.reduce for a in answers], [a.pair for a in answers], [a.reduce_cpu for a in answers]))  # fmt: skip
    layers, alone = config.shapes.layers, median(steps[BOUND])
    scale = min(1.0, alone / (layers * (attention + ffn)))  # blocks timed one by one cannot take longer than together
    attention, ffn = attention * scale, ffn * scale
    rest = alone - layers * (attention + ffn)
    parts = Parts(attention, ffn, lone, max(0.0, pair - lone), rest, layers, 0.0 if config.cuda else cpu)
    ratios = {name: paired_ratio(steps["standard"], steps[name]) for name in VARIANTS}
    return Point(wire, case, steps, parts, answers, ratios)


def _slower(ranks: Iterable[list[float]]) -> list[float]:
    """Of every round, the time of the slower rank."""
    return [max(times) for times in zip(*ranks, strict=True)]


def _rows(name: str, variants: dict[str, Any]) -> list[Row]:
    """Of one point. variants: what `_plain` says of each."""
    rows, standard = [], variants["standard"]["ms"]
    for variant, told in variants.items():
        rows.append(Row(name, f"{variant}: step", told["ms"], "ms", told["bound_ms"], standard))
        if variant != "standard":
            ratio = told["standard_over_this"]
            interval = ratio["low"], ratio["high"]
            rows.append(Row(name, f"standard / {variant}, by pairs", ratio["median"], "x", interval=interval))
    for wiring, told in variants.items():
        if hidden := told["hidden"]:
            rows.append(Row(name, f"{wiring}: reduce time hidden", hidden["counters"] * 100, "%", 100.0))
    return rows


def _summary(points: list[Point]) -> dict[str, Goal]:
    decodes = [p for p in points if p.case.length == 1]
    summary: dict[str, Goal] = {}
    for kind, chosen in (("shaped link", [p for p in decodes if p.wire.rate]),
                         ("emulated latency", [p for p in decodes if p.wire.late_ms])):  # fmt: skip
        near = min((p for p in chosen if not p.in_a_burst), key=lambda p: abs(log(p.weight)), default=None)
        if near and near.answers[0].spans:
            under = [under_the_next_block(s) for a in near.answers for s in a.spans["ladder"]]
            summary[f"{kind}: ladder's reduces on their way under the next block, %"] = at_least(min(under) * 100, 100)
        if near and NEAR[0] <= near.weight <= NEAR[1]:
            where = f"{near.name} (reduce = {near.weight:.2f} modules)"
            summary[f"{kind}: standard / ladder, {where}"] = at_least(near.ratios["ladder"].median, 1.6)
            of_bound = median(near.steps["ladder"]) / shortest_step(near.parts, "ladder")
            summary[f"{kind}: ladder / its bound, {where}"] = at_most(of_bound, 1.1)
        elif chosen:
            name = f"{kind}: standard / ladder (no case whose reduce takes {NEAR[0]} to {NEAR[1]} modules)"
            summary[name] = at_least(None, 1.6)
    if shaped := [p for p in points if p.wire.rate]:
        low, worst = min((p.ratios["ladder"].low, p.name) for p in shaped)
        summary[f"lower end of standard / ladder, worst shaped: {worst}"] = at_least(low, 0.98)
    if seen := [p for p in points if p.hidden("ladder") and p.parts.reduce >= LONG]:
        shares = [p.hidden(wiring) for p in seen for wiring in WIRINGS]
        apart = max(abs(share["counters"] - share["trace"]) for share in shares)
        summary["hidden share, counters against trace, reduces >= 1 ms: points apart"] = at_most(apart * 100, 5)
    return summary


def _write_trace(points: list[Point], path: Path) -> None:
    """The decode case whose reduces take most nearly one module's compute, standard beside ladder."""
    point = min((p for p in points if p.case.length == 1), key=lambda p: abs(log(p.weight)))
    steps = {wiring: [answer.spans[wiring][0] for answer in point.answers] for wiring in WIRINGS}
    write_trace(perfetto(steps), point.name, path)


def _plain(point: Point) -> dict[str, Any]:
    wirings = {
        name: {
            "ms": median(point.steps[name]) * 1e3,
            "bound_ms": shortest_step(point.parts, name) * 1e3,
            "standard_over_this": point.ratios[name]._asdict(),
            "hidden": point.hidden(name),
        }
        for name in VARIANTS
    }
    parts = ("attention", "ffn", "reduce", "spacing", "rest", "cpu")
    return {
        "link": point.wire.name,
        "rate_mbit": point.wire.rate,
        "late_ms": point.wire.late_ms,
        "case": point.case.name,
        "reduce_over_module": point.weight,
        "parts_ms": {name: getattr(point.parts, name) * 1e3 for name in parts},
        "variants": wirings,
    }


SUITE = OverlapBench, run
