"""A case, measured: some traffic, a temperature and a batch, and every side's turns at it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

from stepladder import LLM
from stepladder.launch.bench.speculate.learning import Together
from stepladder.launch.bench.speculate.measures import Figures, Gain, differing, gain
from stepladder.launch.bench.speculate.options import LONGEST, SpeculateBench
from stepladder.launch.bench.speculate.turns import Side, take_turns
from stepladder.launch.bench.speculate.watched import Watched
from stepladder.launch.recipes.chat_material import Library
from stepladder.launch.recipes.chat_traffic import prompts
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.drafter import Drafter
from stepladder.workers.speculation.kinds import Runner, Target

LEARNED = 8  # requests that are served together while drafters learn from them, which is not timed
SETTLED = 8  # further requests, or a batch of them, by which a speculator learns step times of this batch
NONE, AGAIN = "none", "none again"


class Case(NamedTuple):
    kind: str
    temperature: float
    batch: int

    @property
    def sampling(self) -> str:
        return f"temperature {self.temperature:g}" if self.temperature else "greedy"

    @property
    def traffic(self) -> str:
        return f"{self.kind}, {self.sampling}"

    @property
    def name(self) -> str:
        return f"{self.traffic}, batch {self.batch}"


@dataclass(frozen=True)
class Point:
    """Of every side: turns, tokens and seconds of each one; figures; against plain decoding gains and
    the number of texts that differ. of_best_fixed: tokens/s of the first drafter over those with the best fixed length.
    """

    case: Case
    turns: dict[str, list[tuple[int, float]]]
    figures: dict[str, Figures]
    gains: dict[str, Gain]
    differing: dict[str, int]
    of_best_fixed: float | None

    @classmethod
    def of(cls, case: Case, sides: Sequence[Side]) -> "Point":
        plain, others = sides[0].served, sides[1:]
        figures = {side.name: Figures.of(side) for side in sides}
        fixed = [figures[name].per_second for name in figures if " k=" in name]
        chosen = next(figures[side.name].per_second for side in others if side.speculator)
        return cls(
            case,
            {side.name: [(one.tokens, one.seconds) for one in side.served] for side in sides},
            figures,
            {side.name: gain(side.served, plain) for side in others},
            {side.name: differing(side.served, plain) for side in others},
            chosen / max(fixed) if fixed else None,
        )

    def to_json(self) -> dict[str, Any]:
        gains = {name: gain._asdict() for name, gain in self.gains.items()}
        figures = {name: asdict(figures) for name, figures in self.figures.items()}
        return self.case._asdict() | {
            "figures": figures,
            "over_none": gains,
            "texts_that_differ": self.differing,
            "of_best_fixed": self.of_best_fixed,
            "tokens_and_seconds": self.turns,
        }


class Loaded:
    """A target whose drafters' weights are loaded once, whoever asks for them."""

    def __init__(self, target: Target) -> None:
        self.vocab_size = target.vocab_size
        self.runner: Callable[[str, SchedulerConfig], Runner] = cache(target.runner)
        self.head: Callable[[str], Any] = cache(target.head)


class Requests(NamedTuple):
    """Of one kind and temperature, no two alike: from which drafters learn, by which speculators settle, and those that
    are measured."""

    warm: list[Request]
    settling: list[Request]
    measured: list[Request]

    @classmethod
    def make(cls, llm: LLM, library: Library, kind: str, temperature: float, config: SpeculateBench) -> "Requests":
        """Answers end where the model ends them."""
        largest = max(config.batches)
        settling, measured = max(SETTLED, largest), max(config.requests, largest * config.stream)
        made = []
        asked = prompts(llm.tokenizer, kind, config.warm + settling + measured, config.seed, library)
        for number, prompt in enumerate(asked):
            params = SamplingParams(max_tokens=config.tokens, temperature=temperature, seed=number)
            made.append(Request(id=str(number), prompt=prompt[-LONGEST:], params=params))
        return cls(made[: config.warm], made[config.warm : -measured], made[-measured:])


def learned(engine: Engine, config: SpeculateBench, target: Target, requests: Sequence[Request]) -> dict[str, Drafter]:
    """The drafters, after these requests. target: what those with weights are given."""
    drafters = {name: _drafter(engine, config, name, target) for name in config.drafters}
    together = Together(list(drafters.values()))
    side = Side("learning", Watched(together, config.speculate(config.drafters[0])))
    for batch in groups(requests, LEARNED):
        side.serve(engine, batch)
    return drafters


def sides_of(config: SpeculateBench, drafters: dict[str, Drafter], again: bool) -> list[Side]:
    """Plain decoding, perhaps a second time; every drafter; and the first with fixed numbers of tokens. Each goes on
    learning by itself."""
    sides = [Side(NONE), *([Side(AGAIN)] if again else [])]
    wanted: list[tuple[str, str, int | None]] = [(name, name, None) for name in drafters]
    wanted += [(f"{config.drafters[0]} k={k}", config.drafters[0], k) for k in config.fixed]
    for name, drafter, k in wanted:
        sides.append(Side(name, Watched(_copy(drafters[drafter]), config.speculate(drafter, k))))
    return sides


def measure(engine: Engine, case: Case, sides: Sequence[Side], requests: Requests, stream: int = 1) -> Point:
    """stream: requests of a turn, as a multiple of the batch."""
    for side in sides:
        if side.speculator is not None:
            for batch in groups(requests.settling[: max(SETTLED, case.batch)], case.batch):
                side.serve(engine, batch)
            side.speculator.begin()
    take_turns(engine, sides, groups(requests.measured, case.batch * stream), case.batch)
    return Point.of(case, sides)


def groups(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Whole ones; all of them in one if there are fewer."""
    whole = len(requests) // size * size or len(requests)
    return [requests[start : start + size] for start in range(0, whole, size)]


def _drafter(engine: Engine, config: SpeculateBench, name: str, target: Target) -> Drafter:
    drafter = config.speculate(name).drafter(engine.config, target)
    assert drafter is not None
    return drafter


def _copy(drafter: Drafter) -> Drafter:
    """With what it has learned; a model is shared, since sides serve one after the other, and so is a head."""
    runner = getattr(drafter, "executor", None)
    return deepcopy(drafter, {id(runner): runner})
