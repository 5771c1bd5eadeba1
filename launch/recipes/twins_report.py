"""What the twins' runs say together: a JSON in the shape of a bench report, a table and a picture."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepladder.launch.recipes.corpus import Corpus, primed_xz_bits_per_byte
from stepladder.launch.report import Goal, Report, Row, at_most, summary_table, write
from stepladder.launch.table import table

WITHIN = 1.02  # ladder's bits per byte over standard's
COLOURS = {"standard": "#222222", "ladder": "#cc3311", "parallel": "#0077bb", "ladder-parallel": "#ee9900"}
UNIT = "bits per byte"
Result = Mapping[str, Any]


def publish(results: Sequence[Result], corpus: Corpus, run_dir: Path) -> None:
    """Write twins.json and (with matplotlib) twins.png below `run_dir`, and print the summary."""
    report = report_of(results, primed_xz_bits_per_byte(corpus.train, corpus.held_out))
    runs = [{key: value for key, value in result.items() if key != "directory"} for result in results]
    drawn = write(report, "launch.train", sys.argv[1:], run_dir, runs=runs)
    rows = [[row.case, row.metric, f"{row.value:.4f}"] for row in report.rows]
    print(f"{table([['case', 'metric', 'value'], *rows])}\n\n{summary_table(report, '.4f')}")
    print(f"\nwritten to {run_dir / 'twins.json'}{' and .png' if drawn else '; install matplotlib for a picture'}")


def report_of(results: Sequence[Result], primed_xz: float) -> Report:
    """Rows: each run beside primed xz (bound) and the standard run of its seed (rival), then each wiring over the
    seeds: mean, least, most and sample standard deviation of its bits per byte and of its ratio to standard."""
    bits = {(r["wiring"], r["seed"]): r["held_out_bits_per_byte"] for r in results}
    rows = [
        Row(f"{wiring}, seed {seed}", "held-out cost", value, UNIT, primed_xz, bits.get(("standard", seed)))
        for (wiring, seed), value in bits.items()
    ]
    ratios: dict[str, list[float]] = {}
    for wiring in dict.fromkeys(wiring for wiring, _ in bits):
        mine = {seed: value for (other, seed), value in bits.items() if other == wiring}
        rows += _spread(wiring, "held-out cost", list(mine.values()), UNIT)
        pairs = [value / bits["standard", seed] for seed, value in mine.items() if ("standard", seed) in bits]
        if wiring != "standard" and pairs:
            ratios[wiring] = pairs
            rows += _spread(wiring, "ratio to standard", pairs, "1")
    summary = _summary(bits, ratios, primed_xz)
    return Report("twins", rows, summary, draw=lambda figure: draw(figure, results, primed_xz), titled=False)


def _spread(case: str, metric: str, values: list[float], unit: str) -> list[Row]:
    figures = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
    if len(values) > 1:
        figures["standard deviation"] = statistics.stdev(values)
    return [Row(case, f"{metric}, {name}", value, unit) for name, value in figures.items()]


def _summary(
    bits: Mapping[tuple[str, int], float], ratios: Mapping[str, list[float]], primed_xz: float
) -> dict[str, Goal]:
    goals = {}
    standard = [value for (wiring, _), value in bits.items() if wiring == "standard"]
    if standard:
        worst = max(standard)
        goals["worst standard run, bits per byte"] = Goal(worst, f"< {primed_xz:.4g} (primed xz)", worst < primed_xz)
    for wiring, pairs in ratios.items():
        goals[f"{wiring} over standard, mean of the seeds"] = at_most(statistics.mean(pairs), WITHIN)
    return goals


def draw(figure: Any, results: Sequence[Result], primed_xz: float) -> None:
    """Training loss against tokens, by how much it exceeds standard's, and the held-out cost of every run. A run whose
    metrics.jsonl is gone has no curve."""
    figure.set_size_inches(14.5, 4.4)
    curves, gaps, costs = figure.subplots(1, 3)
    logged = [r for r in results if (Path(r["directory"]) / "metrics.jsonl").exists()]
    runs = {(r["wiring"], r["seed"]): losses(Path(r["directory"])) for r in logged}
    for wiring in dict.fromkeys(wiring for wiring, _ in runs):
        mine = {seed: run for (other, seed), run in runs.items() if other == wiring}
        _curve(curves, wiring, list(mine.values()))
        pairs = [(run, runs["standard", seed]) for seed, run in mine.items() if ("standard", seed) in runs]
        if wiring != "standard" and pairs:
            _curve(gaps, wiring, [{t: run[t] - base[t] for t in run.keys() & base.keys()} for run, base in pairs])
    gaps.axhline(0, color=COLOURS["standard"], linewidth=1.2)
    curves.set(xlabel="million tokens", ylabel="nats per token", title="training loss")
    curves.legend(fontsize="small", title="mean and range of the seeds", title_fontsize="small")
    gaps.set(xlabel="million tokens", ylabel="nats per token", title="training loss minus standard's, same seed")
    _dots(costs, results, primed_xz)


def _curve(axes: Any, wiring: str, runs: list[dict[int, float]]) -> None:
    """Mean and range over the seeds, in 40 stretches."""
    tokens = sorted(set.intersection(*(set(run) for run in runs)))
    width = -(-len(tokens) // 40)
    stretches = [tokens[i : i + width] for i in range(0, len(tokens), width)]
    x = [stretch[-1] / 1e6 for stretch in stretches]
    means = [[statistics.mean(run[t] for t in stretch) for stretch in stretches] for run in runs]
    low, middle, high = (list(map(f, zip(*means, strict=True))) for f in (min, statistics.mean, max))
    axes.plot(x, middle, color=COLOURS[wiring], label=wiring, linewidth=1.2)
    axes.fill_between(x, low, high, color=COLOURS[wiring], alpha=0.2, linewidth=0)


def _dots(axes: Any, results: Sequence[Result], primed_xz: float) -> None:
    """Held-out cost: a dot for each run, a line at each wiring's mean."""
    wirings = list(dict.fromkeys(result["wiring"] for result in results))
    for place, wiring in enumerate(wirings):
        values = [result["held_out_bits_per_byte"] for result in results if result["wiring"] == wiring]
        axes.scatter([place] * len(values), values, color=COLOURS[wiring], zorder=3, s=28)
        axes.hlines(statistics.mean(values), place - 0.25, place + 0.25, color=COLOURS[wiring])
    axes.axhline(primed_xz, color="#777777", linestyle="--", label="xz primed with the training text")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize="small")
    axes.set_xticks(range(len(wirings)), wirings)
    axes.set_xlim(-0.6, len(wirings) - 0.4)
    axes.set(ylabel=UNIT, title="held-out text: a dot per seed, a line at the mean")


def losses(directory: Path) -> dict[int, float]:
    """Training loss by tokens, from metrics.jsonl; of steps done twice because of a kill, the last."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {row["train/tokens"]: row["train/loss"] for row in rows if "train/loss" in row}
