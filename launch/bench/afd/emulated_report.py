"""The emulated part: time per layer of the two schedules against their formula, over times of modules and transfers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm

from stepladder.launch.bench.afd.emulated import ROWS, Case, Measured, measure
from stepladder.launch.bench.afd.formula import Times, micro_batches, per_layer
from stepladder.launch.report import Goal, Row, at_least
from stepladder.launch.typed_config import check_counts


@dataclass(frozen=True, kw_only=True)
class EmulatedOptions:
    """times: [attention, ffn, transfer, reduce] in ms of each case. ratios: [A ranks, F ranks] of each case.

    layers: two depths; a layer's time is the difference between them, what is left is filling and draining.
    micro_batches: of the ping-pong, each in turn; None for 1 and as many as keep the busier pool at work.
    """

    times: list[list[float]]
    ratios: list[list[int]]
    layers: list[int]
    steps: int
    micro_batches: list[int] | None = None

    def __post_init__(self) -> None:
        if len(self.layers) != 2 or not 0 < self.layers[0] < self.layers[1]:
            raise ValueError(f"layers is {self.layers}; it must be two depths, the smaller one first")
        if any(len(t) != 4 or min(t) < 0 or min(t[:2]) == 0 for t in self.times) or not self.times:
            raise ValueError("times must be lists of four milliseconds; those of the modules above 0")
        if any(len(r) != 2 or min(r) < 1 for r in self.ratios) or not self.ratios:
            raise ValueError("ratios must be pairs of at least one A rank and one F rank")
        check_counts(self, "steps")
        if self.micro_batches is not None and (not self.micro_batches or min(self.micro_batches) < 1):
            raise ValueError(f"micro_batches is {self.micro_batches}; it must name numbers of at least 1, or be null")
        if self.micro_batches and all(t[3] for t in self.times):
            raise ValueError("micro_batches is of the ping-pong, which is measured at times without a reduce; add some")

    @property
    def cases(self) -> list[Case]:
        """Every time at one A and one F rank, and the first of them at every ratio."""
        cases = []
        for index, ms in enumerate(self.times):
            times = Times(**dict(zip(("attention", "ffn", "transfer", "reduce"), (t / 1e3 for t in ms), strict=True)))
            for a, f in [(1, 1), *([(a, f) for a, f in self.ratios if (a, f) != (1, 1)] if index == 0 else [])]:
                numbers = self.micro_batches or [1, micro_batches(times)]
                schedules = [(0, m) for m in numbers] if not times.reduce else []
                cases += [
                    Case(times=times, lag=lag, micro_batches=m, attention=a, ffn=f)
                    for lag, m in dict.fromkeys([*schedules, (1, 1)])
                ]
        return cases


@dataclass(frozen=True)
class Layer:
    """Seconds of a layer in the steady state, and of filling and draining; deep: the deeper model's measurement."""

    case: Case
    seconds: float
    ends: float
    deep: Measured

    @property
    def of_formula(self) -> float:
        return self.seconds / per_layer(self.case.times, self.case.lag, self.case.micro_batches)


def measure_layers(options: EmulatedOptions) -> list[Layer]:
    layers = []
    for case in tqdm(options.cases, unit="case"):
        shallow, deep = (measure(case, depth, options.steps) for depth in options.layers)
        steps = [median(each.steps) for each in (shallow, deep)]
        seconds = (steps[1] - steps[0]) / (options.layers[1] - options.layers[0])
        layers.append(Layer(case, seconds, steps[1] - options.layers[1] * seconds, deep))
    return layers


def rows(layers: Sequence[Layer]) -> list[Row]:
    made = []
    for layer in layers:
        case, name = layer.case, f"emulated {layer.case.name}"
        step = median(layer.deep.steps)
        formula = per_layer(case.times, case.lag, case.micro_batches)
        tokens = case.attention * case.micro_batches * ROWS
        made += [
            Row(name, "layer", layer.seconds * 1e3, "ms", bound=formula * 1e3),
            Row(name, "fill and drain", layer.ends * 1e3, "ms"),
            Row(name, "TPOT", step * 1e3, "ms"),
            Row(name, "throughput", tokens / step, "tokens/s"),
            Row(name, "exposed communication", layer.deep.exposed * 1e3, "ms/step"),
            Row(name, "A busy", layer.deep.attention_busy * 100, "%"),
            Row(name, "F busy", layer.deep.ffn_busy * 100, "%"),
        ]
    return made


def summary(layers: Sequence[Layer]) -> dict[str, Goal]:
    lines: dict[str, Goal] = {}
    for lag, name in ((0, "ping-pong"), (1, "ladder")):
        if mine := [layer for layer in layers if layer.case.lag == lag]:
            worst = max(mine, key=lambda layer: abs(layer.of_formula - 1))
            goal = Goal(worst.of_formula, "0.9 to 1.1", abs(worst.of_formula - 1) <= 0.1)
            lines[f"emulated {name}: layer / formula, worst: {worst.case.name}"] = goal
    named = {(layer.case.lag, layer.case.micro_batches): layer for layer in layers if _is_named(layer.case)}
    if {(0, 1), (1, 1)} <= named.keys():
        slow, fast = (median(named[key].deep.steps) for key in ((0, 1), (1, 1)))
        lines["emulated TPOT of lag 0 with m = 1 / ladder, tA = tF = 2 tC"] = at_least(slow / fast, 2.5)
    return lines


def _is_named(case: Case) -> bool:
    """tA = tF = 2 tC, which the two schedules are compared at."""
    times = case.times
    equal = times.attention == times.ffn == 2 * times.transfer
    return equal and not times.reduce and (case.attention, case.ffn) == (1, 1)
