"""The picture of suite=engine: what each engine takes in each case, as a multiple of what ours takes."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.engine.beside import GOALS, OURS, Case, shown
from stepladder.launch.bench.engine.work import TITLES

COLOURS = {"transformers": "#ee6677", "vllm": "#ccbb44", "llama.cpp": "#66ccee"}
BOUNDS = {"products": ("our products alone", ":"), "memory": ("reading our weights alone", "--")}


def draw(figure: Any, cases: Sequence[Case], title: str) -> None:
    """A panel per dtype, a group of bars per case."""
    dtypes = [*dict.fromkeys(case.dtype for case in cases)]
    figure.set_size_inches(6.8 * len(dtypes), 4.6)
    figure.suptitle(title, fontsize="medium")
    legend: dict[str, Any] = {}
    for axes, dtype in zip(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0], dtypes, strict=True):
        _panel(axes, [case for case in cases if case.dtype == dtype])
        axes.set_title(dtype, fontsize="medium")
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), fontsize="small")
    figure.axes[0].set_ylabel("time / our time")


def _panel(axes: Any, cases: Sequence[Case]) -> None:
    peers = [*dict.fromkeys(name for case in cases for name in case.seconds if name != OURS)]
    width = 0.8 / max(1, len(peers))
    for group, case in enumerate(cases):
        for place, name in enumerate(peers):
            left, ratio = group - 0.4 + place * width, case.ratio(name)
            if ratio is None:
                axes.text(left + width / 2, 0.05, "-", ha="center")
                continue
            bar = axes.bar(left, ratio, width, align="edge", color=COLOURS[name], label=shown(name, case.dtype))
            axes.bar_label(bar, fmt="%.2f", fontsize="x-small")
            if goal := GOALS.get((case.dtype, name), {}).get(case.letter):
                axes.hlines(goal, left, left + width, color="black", lw=1, label="goal")
        time = case.time()
        for bound, (label, look) in BOUNDS.items():
            if time and (least := getattr(case, bound)):
                axes.hlines(least / time, group - 0.45, group + 0.45, ls=look, color="#4477aa", label=label)
    axes.axhline(1.0, color="#4477aa", lw=1.2, label="ours")
    axes.set_xticks(range(len(cases)), [_label(case) for case in cases], fontsize="small")


def _label(case: Case) -> str:
    title, time = TITLES[case.letter].replace(" by 16, ", "\nby 16, "), case.time()
    return f"{case.letter}\n{title}\n{time:.2f} s" if time else f"{case.letter}\n{title}"
