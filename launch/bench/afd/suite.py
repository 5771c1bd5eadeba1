"""suite=afd: attention and FFN on different ranks.

Emulated: time per layer of the two schedules against their formula. Real: should we disaggregate at all?
"""

from dataclasses import dataclass
from pathlib import Path

from stepladder.launch.bench.afd import emulated_report
from stepladder.launch.bench.afd.emulated_report import EmulatedOptions, Layer, measure_layers
from stepladder.launch.bench.afd.figure import draw
from stepladder.launch.bench.afd.real import report as real_report
from stepladder.launch.bench.afd.real.part import RealOptions, measure
from stepladder.launch.bench.afd.real.point import Point
from stepladder.launch.bench.afd.real.trace import perfetto
from stepladder.launch.bench.rig.perfetto import write_trace
from stepladder.launch.report import Report

WHAT_IS_EMULATED = {
    "emulated": "emulated cases: sleeping modules, late transfers, threads for ranks",
    "real": "real models: link rates by tc-tbf, latency by waiting once per message or reduce",
}


@dataclass(frozen=True, kw_only=True)
class AfdBench:
    """parts: emulated, real, or both. trace: where to write a Perfetto trace of the real part."""

    name: str
    run_dir: str
    parts: list[str]
    emulated: EmulatedOptions
    real: RealOptions
    trace: str | None = None

    def __post_init__(self) -> None:
        if not self.parts or set(self.parts) - WHAT_IS_EMULATED.keys():
            raise ValueError(f"parts is {self.parts}; it must name one or both of {', '.join(WHAT_IS_EMULATED)}")
        if self.trace and "real" not in self.parts:
            raise ValueError("trace is of the real part; add it to parts, or leave trace out")


def run(config: AfdBench) -> Report:
    """Raises ValueError where network namespaces are asked for and not to be had."""
    layers: list[Layer] = []
    points: list[Point] = []
    if "emulated" in config.parts:
        layers = measure_layers(config.emulated)
    if "real" in config.parts:
        journal = Path(config.run_dir) / "afd-rounds.jsonl"
        points = measure(config.real, journal, trace=config.trace is not None)
        if config.trace:
            # of the point whose 2 tC takes most nearly one module's time, an emulated one if there is any
            nearest = min(points, key=lambda point: (not point.wire.late_ms, point.far))
            write_trace(perfetto(nearest.traced), nearest.name, Path(config.trace).absolute())
    rows = [*emulated_report.rows(layers), *real_report.rows(points)]
    lines = emulated_report.summary(layers) | real_report.summary(points)
    details = {"points": {"points": [real_report.plain(point, points) for point in points]}} if points else {}
    emulated = "; ".join(WHAT_IS_EMULATED[part] for part in dict.fromkeys(config.parts))
    return Report("afd", rows, lines, emulated, details, lambda figure: draw(figure, layers, points))


SUITE = AfdBench, run
