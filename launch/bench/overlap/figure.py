"""The picture of suite=overlap: what each wiring gains over standard, link by link, with its bound."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.overlap.bound import shortest_step
from stepladder.launch.bench.overlap.task import BOUND, VARIANTS

COLOURS = {"ladder": "#4477aa", "parallel": "#ccbb44", "ladder-parallel": "#228833", BOUND: "#aaaaaa"}


def draw(figure: Any, points: Sequence[Any]) -> None:
    """A panel per link; in it a group per case and a point per variant: median, 95% interval, and the bound."""
    links = list(dict.fromkeys(point.wire.name for point in points))
    columns = min(3, len(links))
    rows = -(-len(links) // columns)
    figure.set_size_inches(4.6 * columns, 3.4 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for number, link in enumerate(links):
        _panel(axes[number // columns][number % columns], link, [p for p in points if p.wire.name == link])
    for number in range(len(links), rows * columns):
        axes[number // columns][number % columns].axis("off")
    for row in axes:
        row[0].set_ylabel("time of standard / time of variant")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")


def _panel(axes: Any, link: str, points: Sequence[Any]) -> None:
    shown = [name for name in VARIANTS if name != "standard"]
    for place, variant in enumerate(shown):
        x = [group + 0.18 * (place - (len(shown) - 1) / 2) for group in range(len(points))]
        ratios = [point.ratios[variant] for point in points]
        error = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        axes.errorbar(x, [r.median for r in ratios], error, fmt="o", ms=4, capsize=2, color=COLOURS[variant],
                      label=variant)  # fmt: skip
        bounds = [shortest_step(p.parts, "standard") / shortest_step(p.parts, variant) for p in points]
        axes.scatter(x, bounds, marker="_", s=110, color=COLOURS[variant])
    axes.scatter([], [], marker="_", s=110, color="black", label="bound")
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xticks(range(len(points)), [f"{p.case.name}\na/c = {p.weight:.2g}" for p in points], fontsize="x-small")
    axes.set_title(link, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
