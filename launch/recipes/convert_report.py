"""What a conversion cost and how it recovered: a JSON in the shape of a bench report, a table and a picture."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepladder.launch.report import Goal, Report, Row, at_most, summary_table, write
from stepladder.launch.table import table

UNIT = "bits per byte"
BEFORE, WRITTEN = "before", "written"  # the source, and the model in run_dir; besides these, costs are by step


def publish(costs: Mapping[str, float], batch_tokens: int, tolerance: float, run_dir: Path) -> None:
    """Write convert.json and (with matplotlib) convert.png below `run_dir`, and print the summary."""
    before = costs[BEFORE]
    report = report_of(before, curve_of(costs, batch_tokens), costs[WRITTEN], tolerance)
    drawn = write(report, "launch.train", sys.argv[1:], run_dir)
    rows = [[row.case, f"{row.value:.4f}", f"{row.value / before:.3f}"] for row in report.rows if row.value]
    print(table([["held-out text", UNIT, "of before"], *rows]))
    print(f"\n{summary_table(report, '.6g')}")
    print(f"\nmodel, convert.json{' and convert.png' if drawn else ''} written to {run_dir}")


def curve_of(costs: Mapping[str, float], batch_tokens: int) -> dict[int, float]:
    """Cost by tokens spent."""
    return {step * batch_tokens: costs[str(step)] for step in sorted(map(int, costs.keys() - {BEFORE, WRITTEN}))}


def report_of(before: float, curve: Mapping[int, float], written: float, tolerance: float) -> Report:
    """Rows: before, converted but untrained, along the way, as written. The rival of each is the cost before.

    Args:
        written: of the model in run_dir, which has the dtype of the source; training is in fp32.
    """
    rows = [Row("before", "held-out cost", before, UNIT)]
    for tokens, cost in curve.items():
        case = f"converted, after {tokens} tokens" if tokens else "converted, untrained"
        rows.append(Row(case, "held-out cost", cost, UNIT, rival=before))
    rows.append(Row("converted, as written", "held-out cost", written, UNIT, rival=before))
    last = max(curve)
    back = next((tokens for tokens, cost in curve.items() if cost <= before * (1 + tolerance)), None)
    goal = f"<= {last} tokens to within {tolerance:.0%}"
    summary = {
        "cost of the written model, of before": at_most(written / before, 1 + tolerance),
        "tokens until first recovered": Goal(back, goal, back is not None),
    }
    return Report("convert", rows, summary, draw=lambda figure: draw(figure, before, curve, tolerance), titled=False)


def draw(figure: Any, before: float, curve: Mapping[int, float], tolerance: float) -> None:
    """Held-out cost against tokens spent, beside the cost before."""
    figure.set_size_inches(6.4, 4.2)
    axes = figure.subplots()
    thousands = [tokens / 1e3 for tokens in curve]
    axes.plot(thousands, list(curve.values()), marker="o", color="#cc3311", label="converted; first point untrained")
    axes.axhline(before, color="#222222", linestyle="--", label="before the conversion")
    axes.axhspan(before, before * (1 + tolerance), color="#222222", alpha=0.12, label=f"within {tolerance:.0%} of it")
    axes.set(xlabel="thousand tokens of training", ylabel=UNIT, title="held-out cost of the converted model")
    axes.legend(fontsize="small")
