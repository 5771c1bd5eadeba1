"""The picture of suite=shift: acceptance while a stream goes by, as Liu et al. 2310.07177 draw it, and the gain."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.shift.curves import Curve
from stepladder.launch.bench.shift.options import AT_ONCE, ShiftBench
from stepladder.launch.bench.shift.serving import Shifted
from stepladder.launch.bench.shift.streams import Streamed

COLOURS = ("#888888", "#cc3311", "#4477aa", "#228833")
WINDOW = 8  # batches of requests whose mean is drawn


def draw(figure: Any, config: ShiftBench, streams: Sequence[Streamed], points: Sequence[Shifted]) -> None:
    """A panel per stream, and one with a bar per side for each case that was served."""
    panels = len(streams) + len(points)
    figure.set_size_inches(4.0 * min(panels, 3), 3.2 * -(-panels // 3) + 0.5)
    axes = list(figure.subplots(-(-panels // 3), min(panels, 3), squeeze=False).flat)
    for panel, stream in zip(axes, streams, strict=False):
        _stream(panel, stream)
    for panel, shifted in zip(axes[len(streams) :], points, strict=False):
        _served(panel, shifted)
    for empty in axes[panels:]:
        empty.set_visible(False)
    axes[0].set_ylabel(f"acceptance ({config.model.name})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")


def _stream(axes: Any, stream: Streamed) -> None:
    for colour, (name, curve) in zip(COLOURS, stream.curves.items(), strict=False):
        places, values = _smoothed(curve, stream.temperature)
        axes.plot(places, values, color=colour, label=name)
        looks = [(look.come, look.new.at(stream.temperature)) for look in curve.looks]
        if looks and name != "static":
            axes.plot(*zip(*looks, strict=True), "o", ms=3, color=colour)
    if stream.oracle:
        axes.axhline(stream.oracle[0].at(stream.temperature), color="black", lw=0.8, ls="--", label="oracle")
    axes.set_title(stream.name, fontsize="medium")
    axes.set_xlabel("requests of the stream")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)


def _smoothed(curve: Curve, temperature: float) -> tuple[list[int], list[float]]:
    """The mean of the last batches, at the number of requests that had come."""
    values = [found.at(temperature) if found else 0.0 for found in curve.live]
    means = [values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values))]
    return [(i + 1) * AT_ONCE for i in range(len(values))], [sum(part) / len(part) for part in means]


def _served(axes: Any, shifted: Shifted) -> None:
    gains = shifted.point.gains
    names, values = [*gains], [gain.value for gain in gains.values()]
    error = [[g.value - g.low for g in gains.values()], [g.high - g.value for g in gains.values()]]
    axes.bar(range(len(names)), values, yerr=error, color="#4477aa", capsize=2)
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize="small")
    axes.set_title(shifted.point.case.name, fontsize="medium")
    axes.set_ylabel("tokens/s over none")
