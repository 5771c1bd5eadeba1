"""What every suite returns, and the one shape in which it is written and printed."""

import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from stepladder.launch.json_files import write_json
from stepladder.launch.table import table


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        case: what was run. metric: what was measured.
        bound: the best or worst that this value can be, in the same unit. rival: what it competes with measured.
        interval: of 95 % around `value`.
    """

    case: str
    metric: str
    value: float | None
    unit: str
    bound: float | None = None
    rival: float | None = None
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        ratios = {"ratio_to_bound": _ratio(self.value, self.bound), "ratio_to_rival": _ratio(self.value, self.rival)}
        numbers = {name: getattr(self, name) for name in ("case", "metric", "value", "unit", "bound", "rival")}
        return numbers | ratios | ({"interval": self.interval} if self.interval else {})


class Goal(NamedTuple):
    """One line of the summary. A value that could not be measured is None and does not hold."""

    value: float | None
    goal: str
    holds: bool


def at_least(value: float | None, goal: float) -> Goal:
    return Goal(value, f">= {goal:g}", value is not None and value >= goal)


def at_most(value: float | None, goal: float) -> Goal:
    return Goal(value, f"<= {goal:g}", value is not None and value <= goal)


@dataclass(frozen=True)
class Report:
    """A suite's result.

    Attributes:
        emulated: what was not real (link speed, sleeps, virtual ranks); None if everything was.
        details: more results as plain data, each written to a JSON file of its own under its name.
        draw: fills a matplotlib Figure in its own way; None for a panel per metric with a bar per case.
        titled: whether the picture says above what it is of.
        contents: of the details, in words.
    """

    suite: str
    rows: Sequence[Row]
    summary: Mapping[str, Goal]
    emulated: str | None = None
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draw: Callable[[Any], None] | None = None
    titled: bool = True
    contents: str = "details"

    def to_json(self, command: str) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "command": command,
            "machine": machine(),
            "emulated": self.emulated,
            "rows": [row.to_json() for row in self.rows],
            "summary": {name: goal._asdict() for name, goal in self.summary.items()},
        }


def publish(report: Report, words: Sequence[str], run_dir: Path) -> None:
    """Write the report and its details below `run_dir`, and print it, the summary last."""
    shown = ["api_key=***" if word.startswith("api_key=") else word for word in words]
    has_picture = write(report, "launch.bench", shown, run_dir)
    details = {f"{report.suite}-{name}.json": detail for name, detail in report.details.items()}
    for name, detail in details.items():
        write_json(run_dir / name, detail)
    print(_rows_table(report))
    more = f"; {report.contents} in {', '.join(details)} beside it" if details else ""
    hint = " and .png" if has_picture else "; install matplotlib for a picture"
    print(f"\nwritten to {run_dir / report.suite}.json{hint}{more}")
    print(f"\n{summary_table(report)}")


def write(report: Report, module: str, words: Sequence[str], run_dir: Path, **more: Any) -> bool:
    """Write the report, with `more` beside its rows, and a picture of it below `run_dir`; False without matplotlib.

    Args:
        module, words: the command that made it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", module, *words])
    write_json(run_dir / f"{report.suite}.json", report.to_json(command) | more)
    return picture(report, run_dir / f"{report.suite}.png")


def machine() -> dict[str, Any]:
    """Where it was measured."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def picture(report: Report, path: Path) -> bool:
    """The report as a PNG, whole or not at all; False without matplotlib."""

    def draw(figure: Any) -> None:
        (report.draw or partial(_bars, report))(figure)
        if report.titled:
            figure.suptitle(f"{report.suite}{f' (emulated: {report.emulated})' if report.emulated else ''}")

    return drawn(draw, path)


def drawn(draw: Callable[[Any], None], path: Path) -> bool:
    """What `draw` puts into a matplotlib Figure as a PNG, whole or not at all; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    draw(figure)
    partial_path = path.with_suffix(".partial")
    figure.savefig(partial_path, dpi=120, format="png")
    os.replace(partial_path, path)
    return True


def _bars(report: Report, figure: Any) -> None:
    """A panel per metric, a bar per case, with bounds and rivals as marks."""
    metrics = {(row.metric, row.unit): [r for r in report.rows if r.metric == row.metric] for row in report.rows}
    labels = max((len(row.case) for row in report.rows), default=0)  # upright ones take their length in height
    height = 2.6 + 0.065 * labels
    figure.set_size_inches(3.4 * min(4, len(metrics)), 0.6 + height * -(-len(metrics) // 4))
    shown = {}
    for number, ((metric, unit), rows) in enumerate(metrics.items(), 1):
        axes = figure.add_subplot(-(-len(metrics) // 4), min(4, len(metrics)), number)
        axes.bar([row.case for row in rows], [row.value or 0.0 for row in rows], color="#4477aa")
        for name, marker in (("bound", "_"), ("rival", "x")):
            marked = [(row.case, getattr(row, name)) for row in rows if getattr(row, name) is not None]
            if marked:
                cases, marks = zip(*marked, strict=True)
                shown[name] = axes.scatter(cases, marks, marker=marker, s=60, color="#cc3311")
        if len(rows) > 2:
            axes.tick_params(axis="x", labelrotation=90, labelsize="small")
        if not any(row.value for row in rows):
            axes.set_ylim(0, 1)
        axes.set_title(metric, fontsize="medium")
        axes.set_ylabel(unit)
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2, fontsize="small")


def _rows_table(report: Report) -> str:
    heading = ["case", "metric", "value", "unit", "bound", "of bound", "rival", "of rival"]
    rows = [
        [r.case, r.metric, _with_interval(r), r.unit, _short(r.bound), _percent(r.value, r.bound), _short(r.rival),
         _percent(r.value, r.rival)]
        for r in report.rows
    ]  # fmt: skip
    note = f"\nemulated: {report.emulated}" if report.emulated else ""
    return table([heading, *rows]) + note


def _with_interval(row: Row) -> str | None:
    value = _short(row.value)
    return f"{value} ({_short(row.interval[0])} to {_short(row.interval[1])})" if row.interval else value


def summary_table(report: Report, spec: str = ".4g") -> str:
    """The goals, with their values in the format `spec`."""
    rows = [[name, _short(g.value, spec), g.goal, "yes" if g.holds else "NO"] for name, g in report.summary.items()]
    return table([["summary", "value", "goal", "holds"], *rows])


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _percent(value: float | None, other: float | None) -> str | None:
    ratio = _ratio(value, other)
    return None if ratio is None else f"{ratio:.0%}"


def _short(value: float | None, spec: str = ".4g") -> str | None:
    return None if value is None else format(value, spec)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
