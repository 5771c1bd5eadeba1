"""suite=speculate: drafters against plain decoding on SmolLM2 or another model, in one engine on the CPU.

Of every kind of traffic and temperature drafters first learn from some requests. Then all sides serve further ones in
turns, the prefix cache forgotten before each. A gain is tokens per second over plain decoding's, prefill included.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import geometric_mean
from typing import Any

from tqdm import tqdm

from stepladder import LLM
from stepladder.launch.bench.speculate.figure import draw
from stepladder.launch.bench.speculate.measures import FEW, StepError, step_errors
from stepladder.launch.bench.speculate.options import SpeculateBench
from stepladder.launch.bench.speculate.points import (
    AGAIN,
    LEARNED,
    NONE,
    Case,
    Loaded,
    Point,
    Requests,
    learned,
    measure,
    sides_of,
)
from stepladder.launch.bench.speculate.rows import rows_of
from stepladder.launch.bench.speculate.watched import Watched
from stepladder.launch.recipes.chat_material import Library
from stepladder.launch.report import Goal, Report, Row, at_least, at_most
from stepladder.workers.assembly import Target
from stepladder.workers.speculation.config import COUPLED

GOALS = {  # of suffix over none, SmolLM2, one request at a time
    ("tables", 0.0): 1.6,
    ("code", 0.0): 1.4,
    ("prose", 0.0): 1.2,
    ("tables", 1.0): 1.05,
    ("code", 1.0): 1.2,
}
NO_LOSS, REGRET, STEP_ERROR = 0.97, 0.95, 15


def run(config: SpeculateBench) -> Report:
    library = Library.read()
    most = max(LEARNED, *config.batches)
    llm = LLM(config.model.path, "cpu", config.kv_tokens, cache=config.model.cache, threads=config.threads,
              max_sequences=most)  # fmt: skip
    target = Loaded(Target(llm.engine.executor))
    points, speculators = list[Point](), list[Watched]()
    traffic = list(product(config.kinds, config.temperatures))
    with tqdm(total=len(traffic) * len(config.batches), unit="case") as bar:
        for kind, temperature in traffic:
            bar.set_postfix_str(f"{kind} at {temperature:g}, learning")
            requests = Requests.make(llm, library, kind, temperature, config)
            drafters = learned(llm.engine, config, target, requests.warm)
            again = config.spread == "all" or (config.spread == "first" and not speculators)
            for batch in config.batches:
                case = Case(kind, temperature, batch)
                bar.set_postfix_str(case.name)
                sides = sides_of(config, drafters, again)
                points.append(measure(llm.engine, case, sides, requests, config.stream))
                speculators += [side.speculator for side in sides if side.speculator is not None]
                bar.update()
    return report(config, points, step_errors(speculators))


def report(config: SpeculateBench, points: Sequence[Point], errors: Mapping[str, StepError]) -> Report:
    rows = [row for point in points for row in rows_of(point)]
    for size, error in errors.items():
        case = f"steps of {size}, {error.steps} held out"
        rows.append(Row(case, "predicted / measured", error.ratio, "x", 1.0))
        rows.append(Row(case, "mean error of one step", error.error, "%"))
    details: dict[str, dict[str, Any]] = {
        "cases": {"cases": [point.to_json() for point in points]},
        "steps": {size: error._asdict() for size, error in errors.items()},
    }
    summary = dict(_summary(config, points, errors))
    return Report("speculate", rows, summary, None, details, lambda figure: draw(figure, points, config.drafters))


def _summary(
    config: SpeculateBench, points: Sequence[Point], errors: Mapping[str, StepError]
) -> Iterator[tuple[str, Goal]]:
    same = [p for p in points if config.rule == COUPLED or not p.case.temperature]
    yield "texts that differ from plain decoding's", at_most(sum(sum(p.differing.values()) for p in same), 0)
    for point in points:
        goal = GOALS.get(point.case[:2]) if config.model.path == "smollm2" and point.case.batch == 1 else None
        if goal and "suffix" in point.gains:
            paired = f"{len(point.turns[NONE])} pairs after {config.warm} requests"
            yield f"{point.case.name}: suffix / none, {paired}", at_least(point.gains["suffix"].value, goal)
    for batch in config.batches:
        yield from _of_batch(config, [p for p in points if p.case.batch == batch], batch)
    known = {size: abs(error.ratio - 1) * 100 for size, error in errors.items() if error.steps >= FEW}
    worst = max(known, key=lambda size: known[size], default=None)
    name = f"predicted step time, % off, worst: {worst or 'no size was met often enough'}"
    yield name, at_most(known[worst] if worst else None, STEP_ERROR)


def _of_batch(config: SpeculateBench, points: Sequence[Point], batch: int) -> Iterator[tuple[str, Goal]]:
    """What must hold for all traffic; a loss that plain decoding has against itself is none."""
    spread = [point.gains[AGAIN] for point in points if AGAIN in point.gains]
    bar = min([NO_LOSS, *(again.low for again in spread)])
    least, worst = min((p.gains[name].value, f"{name}, {p.case.traffic}") for p in points for name in config.drafters)
    yield f"batch {batch}: least over none: {worst}", at_least(least, round(bar, 3))
    if shares := [point.of_best_fixed for point in points if point.of_best_fixed]:
        name = f"batch {batch}: {config.drafters[0]} over its best fixed length, mean over traffic"
        yield name, at_least(geometric_mean(shares), REGRET)


SUITE = SpeculateBench, run
