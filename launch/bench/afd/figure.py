"""The picture of suite=afd: the emulated layers against their formula, and what the real cases take, link by link."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.afd.emulated import Case as EmulatedCase
from stepladder.launch.bench.afd.emulated_report import Layer
from stepladder.launch.bench.afd.real.point import Point, cases, regime
from stepladder.launch.bench.afd.real.task import LADDER

COLOURS = ("#eecc66", "#ee99aa", "#ee6677", "#aa3377", "#66ccee", "#4477aa", "#228833")
COLOUR = dict(zip(cases(batch=4)[1:], COLOURS, strict=True))
COLUMNS = 3


def draw(figure: Any, layers: Sequence[Layer], points: Sequence[Point]) -> None:
    """The emulated part above, if there is one; below a panel per model and link."""
    panels: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        panels.setdefault((point.model, point.wire.name), []).append(point)
    above, below = bool(layers), -(-len(panels) // COLUMNS)
    heights = [2.8] * above + [3.6] * below
    figure.set_size_inches(15, sum(heights) + 0.8)
    grid = figure.add_gridspec(above + below, COLUMNS, height_ratios=heights)
    if above:
        _layers(figure.add_subplot(grid[0, :]), layers)
    for number, (title, mine) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[above + number // COLUMNS, number % COLUMNS])
        _panel(axes, ", ".join(title), mine, [regime(point, points) for point in mine])
        if number % COLUMNS == 0:
            axes.set_ylabel("TPOT / TPOT of ladder AFD")
        if number == 0:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")


def _layers(axes: Any, layers: Sequence[Layer]) -> None:
    axes.bar(range(len(layers)), [layer.of_formula for layer in layers], color="#4477aa")
    axes.set_xticks(range(len(layers)), [_label(layer.case) for layer in layers], fontsize="xx-small")
    axes.axhspan(0.9, 1.1, color="black", alpha=0.1)
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_ylabel("measured / formula")
    axes.set_title("emulated: time of a layer; ranks, schedule, ms of attention / FFN / transfer / reduce",
                   fontsize="medium")  # fmt: skip


def _label(case: EmulatedCase) -> str:
    times = case.times
    ms = "/".join(f"{t * 1e3:g}" for t in (times.attention, times.ffn, times.transfer, times.reduce))
    return f"{case.attention}A{case.ffn}F\n{'ladder' if case.lag else f'm = {case.micro_batches}'}\n{ms}"


def _panel(axes: Any, title: str, points: Sequence[Point], regimes: Sequence[str]) -> None:
    shown = [case for case in cases(max(point.load.batch for point in points)) if case != LADDER]
    for place, case in enumerate(shown):
        mine = [(group, point) for group, point in enumerate(points) if case in point.turns]
        x = [group + 0.8 * ((place + 0.5) / len(shown) - 0.5) for group, _ in mine]
        ratios = [point.ratio(case, LADDER) for _, point in mine]
        error = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        look = {"color": COLOUR[case], "label": case.name}
        axes.errorbar(x, [r.median for r in ratios], error, fmt="o", ms=4, capsize=2, **look)
        bounds = [point.bound(case).step / point.bound(LADDER).step for _, point in mine]
        axes.scatter(x, bounds, marker="_", s=90, color=COLOUR[case])
    axes.scatter([], [], marker="_", s=90, color="black", label="formula")
    axes.axhline(1.0, color="black", lw=0.6)
    labels = [f"batch {p.load.batch}\n{each}" for p, each in zip(points, regimes, strict=True)]
    axes.set_xticks(range(len(points)), labels, fontsize="x-small")
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
