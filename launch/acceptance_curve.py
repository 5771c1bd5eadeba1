"""A drafter's acceptance over time, out of a deployment's figures: in a terminal, and as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.launch.metrics_file import rows

WIDTH, HEIGHT = 60, 10  # characters of the terminal's picture, without its labels


class Point(NamedTuple):
    """One row of a deployment's figures.

    Attributes:
        seconds: since the traffic changed, below 0 before.
        acceptance: share of the drafter's newest guesses that came. length: tokens per step with a draft.
        version: of the drafter that is live.
    """

    seconds: float
    acceptance: float
    length: float | None
    version: int


@dataclass(frozen=True)
class Curve:
    """Points in order; there may be none."""

    points: Sequence[Point]

    @classmethod
    def read(cls, path: Path, changed: float) -> "Curve":
        """Out of metrics.jsonl.

        Args:
            changed: when the traffic did, on the clock `serve/seconds`.
        """
        return cls([
            Point(
                row["serve/seconds"] - changed, row["spec/acceptance"], row.get("spec/accepted_length"),
                int(row.get("drafter/version", 0)),
            )
            for row in rows(path)
            if "spec/acceptance" in row
        ])  # fmt: skip

    @property
    def swaps(self) -> list[Point]:
        """Where another version is live than at the point before, or the first one."""
        before = [0, *(point.version for point in self.points)]
        return [point for point, version in zip(self.points, before, strict=False) if point.version != version]

    def told(self) -> str:
        """One sentence."""
        after = [point for point in self.points if point.seconds > 0]
        if not after:
            return "acceptance: the drafter has foreseen nothing since the traffic changed"
        old = [point for point in self.points if point.seconds <= 0][-1:]
        before = f"{_figures(old[0])} before the change, " if old else ""
        worst = min(after, key=lambda point: point.acceptance)
        versions = sum(point.seconds > 0 for point in self.swaps)
        return (
            f"acceptance: {before}{_figures(worst)} {worst.seconds:.0f} s after it, {_figures(after[-1])} in the end; "
            f"versions that became live after it: {versions}"
        )

    def text(self) -> str:
        """For a terminal: a star for the mean of each column's points, | where the traffic changed, ^ where another
        version became live; between 0 and 1."""
        if not self.points:
            return "(there is no figure of the drafter's acceptance)"
        first, last = self.points[0].seconds, self.points[-1].seconds
        span = max(last - first, 1e-9)

        def column(seconds: float) -> int:
            return min(int((seconds - first) / span * WIDTH), WIDTH - 1)

        canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
        if first <= 0 <= last:
            for row in canvas:
                row[column(0.0)] = "|"
        columns: dict[int, list[float]] = {}
        for point in self.points:
            columns.setdefault(column(point.seconds), []).append(point.acceptance)
        for place, found in columns.items():
            mean = sum(found) / len(found)
            canvas[HEIGHT - max(1, ceil(mean * HEIGHT))][place] = "*"
        marks = [" "] * WIDTH
        for swap in self.swaps:
            marks[column(swap.seconds)] = "^"
        labels = {0: "1.0", HEIGHT // 2: "0.5"}
        lines = [f"{labels.get(number, ''):>4} |{''.join(row)}" for number, row in enumerate(canvas)]
        left, right = f"{first:+.0f} s", f"{last:+.0f} s"
        lines += [
            f"{'0.0':>4} +{'-' * WIDTH}",
            f"{'':>6}{''.join(marks)}",
            f"{'':>6}{left}{right:>{WIDTH - len(left)}}",
        ]
        return "\n".join(line.rstrip() for line in lines)

    def draw(self, figure: Any) -> None:
        """Into a matplotlib Figure."""
        figure.set_size_inches(6.4, 3.2)
        axes = figure.subplots()
        axes.plot([p.seconds for p in self.points], [p.acceptance for p in self.points], color="#4477aa")
        swaps = self.swaps
        axes.plot([p.seconds for p in swaps], [p.acceptance for p in swaps], "o", ms=4, color="#cc3311",
                  label="another version is live")  # fmt: skip
        axes.axvline(0.0, color="black", lw=0.8, ls="--", label="traffic changes")
        axes.set_xlabel("seconds since traffic turned from programs to tables")
        axes.set_ylabel("share of guesses that came")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")


def _figures(point: Point) -> str:
    length = "" if point.length is None else f" ({point.length:.2f} tokens per step with a draft)"
    return f"{point.acceptance:.2f}{length}"
