"""One request while other processes compute on the same cores: how many times longer it takes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from subprocess import Popen
from sys import executable

from stepladder.launch.bench.engine.engines import ours
from stepladder.launch.bench.engine.options import EngineBench
from stepladder.launch.bench.engine.work import TITLES, works
from stepladder.launch.report import Goal, Row, at_most

CASE, SLOWER = "A", 4.0  # what two neighbours on two cores may cost
BUSY = [executable, "-c", "while True: pass"]


def measure(config: EngineBench, model: Path, vocabulary: int) -> tuple[list[Row], dict[str, Goal]]:
    """In turns: alone, and beside as many busy processes as there are threads."""
    alone, beside = [], []
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    log = Path(config.run_dir, "engine-neighbours.log")
    with ours(model, "float32", config.threads, log) as engine:
        given = (works(vocabulary, seed, config.scale)[CASE] for seed in count())  # other prompts: none is cached
        engine.run(next(given))
        for _ in range(config.repeats):
            alone.append(_seconds(engine.run(next(given))))
            with busy(config.threads):
                beside.append(_seconds(engine.run(next(given))))
    name = f"{CASE} ({TITLES[CASE]}) float32"
    row = Row(name, f"time beside {config.threads} busy processes", median(beside), "s", rival=median(alone))
    return [row], {f"{name}, beside busy processes / alone": at_most(_ratio(beside, alone), SLOWER)}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that do nothing but compute, until exit."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(Popen(BUSY))
            stack.callback(process.kill)
        yield


def _ratio(beside: Sequence[float], alone: Sequence[float]) -> float:
    return median(b / a for b, a in zip(beside, alone, strict=True))


def _seconds(answer: dict[str, float] | None) -> float:
    assert answer is not None
    return answer["seconds"]
