"""The picture of suite=speculate: what each drafter gains over plain decoding, by batch."""

from collections.abc import Sequence
from typing import Any

COLOURS = ("#4477aa", "#cc3311", "#228833", "#ccbb44", "#aa3377")


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
    batches = [point.case.batch for point in points]
    for name, colour in zip(drafters, COLOURS, strict=False):
        gains = [point.gains[name] for point in points]
        error = [[g.value - g.low for g in gains], [g.high - g.value for g in gains]]
        axes.errorbar(batches, [g.value for g in gains], error, fmt="o-", ms=4, capsize=2, color=colour, label=name)
        axes.plot(batches, [point.figures[name].predicted for point in points], ":", color=colour)
    axes.plot([], [], ":", color="black", label="predicted")
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.grid(axis="y", alpha=0.3)
