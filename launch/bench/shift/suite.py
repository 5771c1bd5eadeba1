"""suite=shift: traffic shifts from one kind to another; drafters that learn from it against those that do not.

The target's answers are recorded once, with the hidden states they were drawn from. Heads then see the same stream, in
batches of eight requests: what each would have been worth for a batch is judged before anybody learns from it. After a
sharp stream drafters serve other requests of the new kind end to end, in turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepladder.launch.bench.shift.figure import draw
from stepladder.launch.bench.shift.goals import summary
from stepladder.launch.bench.shift.options import ShiftBench
from stepladder.launch.bench.shift.serving import FROZEN, ONLINE, Shifted, served
from stepladder.launch.bench.shift.shapes import SHARP
from stepladder.launch.bench.shift.streams import STATIC, Bench, Streamed
from stepladder.launch.bench.speculate.points import Case
from stepladder.launch.bench.speculate.rows import rows_of
from stepladder.launch.report import Report, Row
from stepladder.workers.training.ranks import training_ranks


def run(config: ShiftBench) -> Report:
    cases = list(product(config.kinds, config.temperatures))
    streams, points = list[Streamed](), list[Shifted]()
    with tqdm(unit="request") as bar, training_ranks() as ranks:

        def told(doing: str, count: int) -> None:
            bar.set_postfix_str(doing)
            bar.update(count)

        bench = Bench(config, ranks, told)
        for kind, temperature in cases:
            texts, requests = bench.texts(kind, temperature)
            for shape in config.shapes:
                stream, states = bench.streamed(shape, kind, temperature, texts)
                streams.append(stream)
                for batch in config.batches if shape == SHARP and config.requests else ():
                    case = Case(kind, temperature, batch)
                    bar.set_postfix_str(f"serving {case.name}")
                    folder = Path(config.run_dir) / "heads" / f"{kind}-{temperature:g}"
                    points.append(served(bench.llm.engine, config, case, states, bench.loaded, requests, folder))
    return report(config, streams, points)


def report(config: ShiftBench, streams: Sequence[Streamed], points: Sequence[Shifted]) -> Report:
    rows = [row for stream in streams for row in _rows(stream)]
    for shifted in points:
        rows += rows_of(shifted.point)
        for name, gain in shifted.over_frozen.items():
            case = f"{shifted.point.case.name}: {name} {ONLINE}"
            rows.append(Row(case, f"over {FROZEN}", gain.value, "x", interval=(gain.low, gain.high)))
    details: dict[str, dict[str, Any]] = {
        "streams": {"streams": [_plain(stream) for stream in streams]},
        "cases": {"cases": [one.point.to_json() | {"over_frozen": _plain(one.over_frozen)} for one in points]},
    }
    return Report(
        "shift",
        rows,
        dict(summary(config, streams, points)),
        None,
        details,
        lambda figure: draw(figure, config, streams, points),
    )


def _rows(stream: Streamed) -> Iterator[Row]:
    t = stream.temperature
    bound = stream.oracle[0].at(t) if stream.oracle else None
    yield Row(f"{stream.name}: {STATIC}", "acceptance, new kind", stream.static[0].at(t) * 100, "%", _percent(bound))
    yield Row(f"{stream.name}: {STATIC}", "acceptance, old kind", stream.static[1].at(t) * 100, "%")
    for name, curve in stream.curves.items():
        if name == STATIC:
            continue
        for look in curve.looks:
            case = f"{stream.name}: {name}, {look.come} requests"
            rivals = [found.at(t) * 100 for found in stream.static]
            yield Row(case, "acceptance, new kind", look.new.at(t) * 100, "%", _percent(bound), rivals[0])
            yield Row(case, "acceptance, old kind", look.old.at(t) * 100, "%", rival=rivals[1])
        if curve.looks and curve.looks[-1].steps:
            last = curve.looks[-1]
            yield Row(f"{stream.name}: {name}", "optimizer steps per 100 requests", 100 * last.steps / last.come, "")
            yield Row(f"{stream.name}: {name}", "CPU seconds per 100 requests", 100 * last.seconds / last.come, "s")


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _plain(value: Any) -> Any:
    """Named tuples and dataclasses, however deep, as dictionaries."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


SUITE = ShiftBench, run
