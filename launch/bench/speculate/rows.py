"""A measured point as lines of a report."""

from collections.abc import Iterator

from stepladder.launch.bench.speculate.points import NONE, Point
from stepladder.launch.report import Row

SHOWN = 4  # places of a draft whose acceptance is printed; all are in the details


def rows_of(point: Point) -> Iterator[Row]:
    """What is printed of every side."""
    plain = point.figures[NONE]
    if point.of_best_fixed:
        yield Row(point.case.name, "goodput over the best fixed length", point.of_best_fixed, "x")
    for name, figures in point.figures.items():
        case = f"{point.case.name}: {name}"
        rivals = (None, (None, None)) if name == NONE else (plain.per_second, plain.per_token)
        yield Row(case, "tokens/s", figures.per_second, "1/s", rival=rivals[0])
        for percent, ms, rival in zip((50, 99), figures.per_token, rivals[1], strict=True):
            yield Row(case, f"TPOT p{percent}", ms, "ms", rival=rival)
        if gain := point.gains.get(name):
            interval = gain.low, gain.high
            yield Row(case, "over none (bound: predicted)", gain.value, "x", figures.predicted, interval=interval)
            yield Row(case, "over none, median of turns", gain.median, "x")
        for place, share in enumerate((figures.accepted or ())[:SHOWN], 1):
            yield Row(case, f"accepted of those reached, token {place}", share * 100, "%")
        if figures.length:
            yield Row(case, "mean accepted length", figures.length, "tokens")
        if figures.draft_ms and figures.share is not None:
            yield Row(case, "drafting before a step", figures.draft_ms, "ms")
            yield Row(case, "drafting, share of the time", figures.share * 100, "%")
