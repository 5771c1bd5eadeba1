"""suite=afd: time per layer of the two schedules against their formula, over times of modules and of transfers.

So far the emulated part: real loops and real edges, modules that sleep, transfers that come late.
"""

from dataclasses import dataclass
from statistics import median

from tqdm import tqdm

from launch.bench.afd.emulated import ROWS, Case, Measured, measure
from launch.bench.afd.formula import Times, micro_batches, per_layer
from launch.bench.report import Goal, Report, Row, at_least, at_most

NAMED = (10.0, 10.0, 5.0)  # tA = tF = 2 tC, the case that the two schedules are compared at


@dataclass(frozen=True, kw_only=True)
class AfdBench:
    """times: [attention, ffn, transfer, reduce] in ms of each case. ratios: [A ranks, F ranks] of each case.

    layers: two depths; a layer's time is the difference between them, what is left is filling and draining.
    """

    name: str
    run_dir: str
    times: list[list[float]]
    ratios: list[list[int]]
    layers: list[int]
    steps: int

    def __post_init__(self) -> None:
        if len(self.layers) != 2 or not 0 < self.layers[0] < self.layers[1]:
            raise ValueError(f"layers is {self.layers}; it must be two depths, the smaller one first")
        if any(len(t) != 4 or min(t) < 0 or min(t[:2]) == 0 for t in self.times) or not self.times:
            raise ValueError("times must be lists of four milliseconds; those of the modules above 0")
        if any(len(r) != 2 or min(r) < 1 for r in self.ratios) or not self.ratios:
            raise ValueError("ratios must be pairs of at least one A rank and one F rank")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")

    @property
    def cases(self) -> list[Case]:
        """Every time at one A and one F rank, and the first of them at every ratio."""
        cases = []
        for index, ms in enumerate(self.times):
            times = Times(**dict(zip(("attention", "ffn", "transfer", "reduce"), (t / 1e3 for t in ms), strict=True)))
            for a, f in [(1, 1), *([(a, f) for a, f in self.ratios if (a, f) != (1, 1)] if index == 0 else [])]:
                schedules = [(0, 1), (0, micro_batches(times))] if not times.reduce else []
                cases += [
                    Case(times=times, lag=lag, micro_batches=m, attention=a, ffn=f)
                    for lag, m in dict.fromkeys([*schedules, (1, 1)])
                ]
        return cases


@dataclass(frozen=True)
class Point:
    """Seconds of a layer in the steady state, and of filling and draining; deep: the deeper model's measurement."""

    case: Case
    layer: float
    ends: float
    deep: Measured

    @property
    def of_formula(self) -> float:
        return self.layer / per_layer(self.case.times, self.case.lag, self.case.micro_batches)


def run(config: AfdBench) -> Report:
    points = []
    for case in tqdm(config.cases, unit="case"):
        shallow, deep = (measure(case, layers, config.steps) for layers in config.layers)
        steps = [median(each.steps) for each in (shallow, deep)]
        layer = (steps[1] - steps[0]) / (config.layers[1] - config.layers[0])
        points.append(Point(case, layer, steps[1] - config.layers[1] * layer, deep))
    emulated = "modules sleep, transfers and the F ranks' reduce come late; A and F are threads with gloo between them"
    return Report("afd", _rows(points), _summary(points), emulated)


def _rows(points: list[Point]) -> list[Row]:
    rows = []
    for point in points:
        case, name = point.case, point.case.name
        step = median(point.deep.steps)
        formula = per_layer(case.times, case.lag, case.micro_batches)
        tokens = case.attention * case.micro_batches * ROWS
        rows += [
            Row(name, "layer", point.layer * 1e3, "ms", bound=formula * 1e3),
            Row(name, "fill and drain", point.ends * 1e3, "ms"),
            Row(name, "TPOT", step * 1e3, "ms"),
            Row(name, "throughput", tokens / step, "tokens/s"),
            Row(name, "A busy", point.deep.attention_busy * 100, "%"),
            Row(name, "F busy", point.deep.ffn_busy * 100, "%"),
        ]
    return rows


def _summary(points: list[Point]) -> dict[str, Goal]:
    summary: dict[str, Goal] = {}
    for lag, name in ((0, "ping-pong"), (1, "ladder")):
        if mine := [p for p in points if p.case.lag == lag]:
            worst = max(mine, key=lambda p: abs(p.of_formula - 1))
            summary[f"{name}: layer / formula, worst: {worst.case.name}"] = at_most(worst.of_formula, 1.1)
    named = {(p.case.lag, p.case.micro_batches): p for p in points if _is_named(p.case)}
    if {(0, 1), (1, 1)} <= named.keys():
        slow, fast = (median(named[key].deep.steps) for key in ((0, 1), (1, 1)))
        summary["TPOT of lag 0 with m = 1 / ladder, tA = tF = 2 tC"] = at_least(slow / fast, 2.5)
    return summary


def _is_named(case: Case) -> bool:
    times = case.times
    asked = tuple(round(t * 1e3, 6) for t in (times.attention, times.ffn, times.transfer))
    return asked == NAMED and not times.reduce and (case.attention, case.ffn) == (1, 1)
