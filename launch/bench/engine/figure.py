"""The picture of suite=engine: what each engine takes in each case, as a multiple of what ours takes."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.engine.beside import GOALS, OURS, Case, shown

COLOURS = {"transformers": "#ee6677", "vllm": "#ccbb44", "llama.cpp": "#66ccee"}
BOUNDS = {"products": "our products alone", "memory": "reading our weights alone"}


def draw(figure: Any, cases: Sequence[Case]) -> None:
    """A panel per dtype, a group of bars per case."""
    dtypes = [*dict.fromkeys(case.dtype for case in cases)]
    figure.set_size_inches(6.8 * len(dtypes), 4.6)
    for axes, dtype in zip(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0], dtypes, strict=True):
        _panel(axes, dtype, [case for case in cases if case.dtype == dtype])
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.axes[0].set_ylabel("time / our time")


def _panel(axes: Any, dtype: str, cases: Sequence[Case]) -> None:
    peers = [*dict.fromkeys(name for case in cases for name in case.seconds if name != OURS)]
    width = 0.8 / max(1, len(peers))
    for place, name in enumerate(peers):
        for group, case in enumerate(cases):
            x, ratio, goal = group - 0.4 + (place + 0.5) * width, case.ratio(name), GOALS.get((dtype, name), {})
            if ratio is None:
                axes.text(x, 0.05, "–", ha="center")
                continue
            bar = axes.bar(x, ratio, width, color=COLOURS[name], label=name)
            axes.bar_label(bar, fmt="%.2f", fontsize="x-small")
            if case.letter in goal:
                axes.scatter(x, goal[case.letter], marker="_", s=3000 * width, color="black", lw=0.8, label="goal")
    for look, (bound, label) in zip((":", "--"), BOUNDS.items(), strict=True):
        shares = [(group, getattr(case, bound), case.time()) for group, case in enumerate(cases)]
        known = [(group, least / time) for group, least, time in shares if least and time]
        for group, share in known:
            axes.hlines(share, group - 0.45, group + 0.45, ls=look, color="#4477aa", label=label)
    axes.axhline(1.0, color="#4477aa", lw=1.2, label="ours")
    axes.set_xticks(range(len(cases)), [_label(case) for case in cases], fontsize="small")
    axes.set_title(
        dtype if dtype == "float32" else f"{dtype} (llama.cpp: {shown('llama.cpp', dtype).split()[-1]})",
        fontsize="medium",
    )


def _label(case: Case) -> str:
    time = case.time()
    words = (
        case.name.removesuffix(f" {case.dtype}").replace(" (", "\n").removesuffix(")").replace(" by 16, ", "\nby 16, ")
    )
    return f"{words}\n{time:.2f} s" if time else words
