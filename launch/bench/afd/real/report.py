"""What the real part says: rows, the lines of the summary, and the same as plain data."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.afd.real.point import Point, cases, regime, tokens_task
from stepladder.launch.bench.afd.real.task import AFD, COLOCATED, LADDER, LAG0, Case
from stepladder.launch.report import Goal, Row, at_least

NOTICED = 0.5  # of one module's time is 2 tC at least, where it is what ladder AFD hides
PLAIN = "no goal"


def rows(points: Sequence[Point]) -> list[Row]:
    made = []
    for point in points:
        told = plain(point, points)["cases"]
        lag0 = told[LAG0.name]
        for case, numbers in told.items():
            name = f"{point.name}: {case}"
            made += [
                Row(name, "TPOT", numbers["TPOT_ms"], "ms", numbers["bound_ms"], lag0["TPOT_ms"]),
                Row(name, "throughput", numbers["tokens_per_s"], "tokens/s", rival=lag0["tokens_per_s"]),
                *(Row(name, metric, percent, "%") for metric, percent in numbers["busy_percent"].items()),
                Row(name, "exposed communication", numbers["exposed_ms"], "ms/step"),
            ]
            if numbers["layer_formula_ms"]:
                made.append(Row(name, "layer", numbers["layer_ms"], "ms", numbers["layer_formula_ms"]))
    return made


def summary(points: Sequence[Point]) -> dict[str, Goal]:
    lines: dict[str, Goal] = {}
    if not points:
        return lines
    for model in dict.fromkeys(point.model for point in points):
        mine = [p for p in points if p.model == model]
        lines |= _goals("shaped link", [p for p in mine if p.wire.rate], points)
        lines |= _goals("emulated latency", [p for p in mine if p.wire.late_ms], points)
    lines |= _against("best ping-pong", {point.name: (point, point.best_ping_pong) for point in points})
    for rival in COLOCATED:
        lines |= _against(rival.name, {point.name: (point, rival) for point in points})
    alike = min(point.alike for point in points)
    lines["sequences that all cases of a wiring continue alike, worst point, %"] = at_least(alike * 100, 99)
    return lines


def _goals(kind: str, mine: Sequence[Point], points: Sequence[Point]) -> dict[str, Goal]:
    """Of the point where 2 tC takes most nearly one module's time. mine: one model's with one kind of link.

    Where ladder AFD is meant for none of them, the lines say so and do not hold; a kind not measured has no lines.
    """
    if not mine:
        return {}
    eligible = [p for p in mine if regime(p, points) != "compute-bound" and p.weight >= NOTICED and not p.in_a_burst]
    point = min(eligible, key=lambda p: p.far, default=None)
    over: list[float | None] = [None, None]
    where, best = f"{mine[0].model}: no point of {len(mine)} was eligible", "best ping-pong"
    if point:
        where = f"{point.name} ({regime(point, points)}, 2 tC = {point.weight:.2f} modules)"
        over = [point.ratio(case, LADDER).median for case in (LAG0, point.best_ping_pong)]
        best += f", m = {point.best_ping_pong.micro_batches}"
    return {
        f"{kind}: TPOT of lag 0, m = 1 / ladder AFD, {where}": at_least(over[0], 1.8),
        f"{kind}: TPOT of {best} / ladder AFD, {where}": at_least(over[1], 1.3),
    }


def _against(rival: str, found: dict[str, tuple[Point, Case]]) -> dict[str, Goal]:
    """Where ladder AFD gains most over a rival and where least, and how often it is behind."""
    ratios = {name: point.ratio(case, LADDER).median for name, (point, case) in found.items()}
    behind = sum(ratio < 1 for ratio in ratios.values())
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    where = f"{rival} ahead of ladder AFD at {behind} of {len(ratios)} points"
    return {
        f"{where}; its TPOT / ladder AFD's where that is least: {least}": Goal(ratios[least], PLAIN, True),
        f"TPOT of {rival} / ladder AFD where that is most: {most}": Goal(ratios[most], PLAIN, True),
    }


def plain(point: Point, points: Sequence[Point]) -> dict[str, Any]:
    """Everything about one of the points that JSON takes."""
    return {
        "model": point.model,
        "link": point.wire.name,
        "rate_mbit": point.wire.rate,
        "late_ms": point.wire.late_ms,
        "batch": point.load.batch,
        "context": point.load.context,
        "regime": regime(point, points),
        "two_tC_over_module": point.weight,
        "tokens_reduce_ms": point.transfers[tokens_task(point.load)].one * 1e3,
        "best_ping_pong": point.best_ping_pong.name,
        "cases": {case.name: _plain_case(point, case) for case in cases(point.load.batch)},
    }


def _plain_case(point: Point, case: Case) -> dict[str, Any]:
    (modules, sent), bound, step = point.parts(case), point.bound(case), point.step(case)
    ranks = ("A busy", "F busy") if case.kind == AFD else ("rank 0 busy", "rank 1 busy")
    return {
        "TPOT_ms": step * 1e3,
        "tokens_per_s": point.load.batch / step,
        "busy_percent": {rank: share * 100 for rank, share in zip(ranks, point.busy(case), strict=True)},
        "exposed_ms": point.exposed(case) * 1e3,
        "tA_ms": modules.attention * 1e3,
        "tF_ms": modules.ffn * 1e3,
        "tC_ms": sent.one * 1e3,
        "spacing_ms": sent.spacing * 1e3,
        "rest_ms": point.rest(case) * 1e3,
        "bound_ms": bound.step * 1e3,
        "of_bound": step / bound.step,
        "layer_ms": point.layer(case) * 1e3 if bound.layer else None,
        "layer_formula_ms": bound.layer * 1e3 if bound.layer else None,
        "this_over_ladder_AFD": point.ratio(case, LADDER)._asdict(),
    }
