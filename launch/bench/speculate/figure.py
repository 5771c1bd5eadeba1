"""The picture of suite=speculate: what each drafter gains over plain decoding, by batch."""

from collections.abc import Sequence
from typing import Any

COLOURS = ("#4477aa", "#cc3311", "#228833", "#ccbb44", "#aa3377", "#66ccee")
BESIDE = 0.12  # of the distance between two batches


def draw(figure: Any, points: Sequence[Any], drafters: Sequence[str]) -> None:
    """A panel per kind of traffic and temperature; in it a line per drafter with its 95% intervals, and what was
    predicted."""
    kinds = list(dict.fromkeys(point.case.kind for point in points))
    samplings = list(dict.fromkeys(point.case.sampling for point in points))
    figure.set_size_inches(3.2 * len(kinds) + 0.6, 2.8 * len(samplings) + 0.8)
    axes = figure.subplots(len(samplings), len(kinds), squeeze=False, sharex=True, sharey=True)
    for row, sampling in zip(axes, samplings, strict=True):
        for panel, kind in zip(row, kinds, strict=True):
            chosen = [p for p in points if (p.case.kind, p.case.sampling) == (kind, sampling)]
            _panel(panel, sorted(chosen, key=lambda p: p.case.batch), drafters)
            panel.set_title(f"{kind}, {sampling}", fontsize="medium")
        row[0].set_ylabel("tokens/s over none")
    for panel in axes[-1]:
        panel.set_xlabel("batch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")


def _panel(axes: Any, points: Sequence[Any], drafters: Sequence[str]) -> None:
    """Drafters stand beside each other at every batch."""
    for nth, (name, colour) in enumerate(zip(drafters, COLOURS, strict=False)):
        gains = [point.gains[name] for point in points]
        error = [[g.value - g.low for g in gains], [g.high - g.value for g in gains]]
        places = [place + BESIDE * (nth - (len(drafters) - 1) / 2) for place in range(len(points))]
        axes.errorbar(places, [g.value for g in gains], error, fmt="o-", ms=4, capsize=2, color=colour, label=name)
        axes.plot(places, [point.figures[name].predicted for point in points], "_", ms=12, color=colour)
    axes.plot([], [], "_", ms=12, color="black", label="predicted")
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xticks(range(len(points)), [str(point.case.batch) for point in points])
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.grid(axis="y", alpha=0.3)
