"""The picture of suite=hostile: pauses of each stream side by side, answers by status, and memory over time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#bbbbbb", "#888888", "#4477aa")


def draw(
    figure: Any,
    pauses: Mapping[str, Sequence[float]],
    bounds: Sequence[float],
    answers: Mapping[str, int],
    memory: Mapping[str, Sequence[tuple[float, float]]],
    attack: tuple[float, float],
) -> None:
    """Three panels.

    Args:
        pauses: by phase, the longest of each stream, in seconds. bounds: of each stream under attack.
        answers: how many, by status.
        memory: by process, times and MiB. attack: from when to when it went.
    """
    figure.set_size_inches(13, 3.8)
    left, middle, right = figure.subplots(1, 3)
    _pauses(left, pauses, bounds)
    middle.bar(list(answers), list(answers.values()), color=COLOURS[2])
    middle.set_yscale("log")
    middle.set_title("answers to the attack, by status", fontsize="medium")
    middle.tick_params(axis="x", labelrotation=90)
    for name, samples in memory.items():
        right.plot([time - attack[0] for time, _ in samples], [size for _, size in samples], label=name)
    right.axvspan(0, attack[1] - attack[0], color="#cc3311", alpha=0.1, label="attack")
    right.set_title("resident memory, MiB", fontsize="medium")
    right.set_xlabel("s")
    right.set_ylim(0)
    right.legend(fontsize="small")


def by_status(answers: Mapping[str, Counter[str]]) -> dict[str, int]:
    return dict(sorted(sum(answers.values(), Counter()).items()))


def _pauses(axes: Any, pauses: Mapping[str, Sequence[float]], bounds: Sequence[float]) -> None:
    width = 0.8 / len(pauses)
    for place, (name, longest) in enumerate(pauses.items()):
        axes.bar([nth + place * width for nth in range(len(longest))], longest, width, label=name, color=COLOURS[place])
    axes.scatter([nth + 0.4 - width / 2 for nth in range(len(bounds))], bounds, marker="_", s=200, color="#cc3311",
                 label="bound under attack")  # fmt: skip
    axes.set_title("longest pause of each honest stream, s", fontsize="medium")
    axes.set_xlabel("stream")
    axes.legend(fontsize="small")
