"""The cases on every engine, in turns, and what is said about them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
from tqdm import tqdm

from stepladder.launch.bench.engine.bounds import Products, read_bandwidth
from stepladder.launch.bench.engine.engines import Engine, LlamaCpp, ProcessEngine, ours, peer
from stepladder.launch.bench.engine.options import EngineBench
from stepladder.launch.bench.engine.work import TITLES, works
from stepladder.launch.report import Goal, Row, at_least, at_most

OURS, LLAMA_CPP, WARM_UP = "ours", "llama.cpp", 0.25  # how long the cases of the first round are, which does not count
FILES = {"float32": "F32", "bfloat16": "F16"}  # what llama.cpp reads instead
GOALS = {  # their time over ours, by case
    ("float32", "transformers"): {"A": 2.0, "B": 2.0, "C": 2.2, "D": 3.0, "E": 1.05},
    ("float32", "vllm"): {"A": 2.0, "B": 1.5, "C": 1.4, "D": 1.2, "E": 1.3},
    ("float32", LLAMA_CPP): {"A": 1.0, "B": 1.3, "E": 1.4},
    ("bfloat16", LLAMA_CPP): {"A": 0.95, "B": 1.1, "E": 1.1},
}
SLOWER = 1.05  # that bf16 may be than fp32


@dataclass
class Case:
    """One case in one dtype.

    Attributes:
        seconds: of each engine that can be given it, by round. steps: of ours, as `Products` takes them.
        products, memory: our time if those steps were matrix products alone, or only read the weights; None where our
            kernels are not native.
    """

    letter: str
    dtype: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    steps: list[list[int]] = field(default_factory=list)
    products: float | None = None
    memory: float | None = None

    @property
    def name(self) -> str:
        return f"{self.letter} ({TITLES[self.letter]}) {self.dtype}"

    def take(self, engine: str, answer: dict[str, Any]) -> None:
        """What an engine's process says to this work."""
        self.seconds.setdefault(engine, []).append(answer["seconds"])
        self.steps = answer.get("steps", self.steps)

    def time(self, engine: str = OURS) -> float | None:
        return median(self.seconds[engine]) if self.seconds.get(engine) else None

    def ratio(self, engine: str, other: "Case | None" = None) -> float | None:
        """The median over rounds of an engine's time over ours, or over ours of another case; None: not measured."""
        pairs = zip(self.seconds.get(engine, ()), (other or self).seconds[OURS], strict=False)
        return median(ratios) if (ratios := [theirs / own for theirs, own in pairs]) else None


class Side(NamedTuple):
    """One engine with the model in one dtype."""

    name: str
    dtype: str
    engine: Engine


def measure(config: EngineBench, model: Path, vocabulary: int) -> list[Case]:
    """Every engine's time in every case, round by round. What processes say goes to run_dir/engine-NAME-DTYPE.log."""
    cases = {(letter, dtype): Case(letter, dtype) for letter in config.cases for dtype in config.dtypes}
    listed = [*sides(config, model)]
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=(config.repeats + 1) * len(config.cases) * len(listed), unit="turn"))
        for side in listed:
            bar.set_postfix_str(f"starting {side.name} {side.dtype}")
            stack.enter_context(side.engine)
        for number in range(config.repeats + 1):
            given = works(vocabulary, number, config.scale * (1.0 if number else WARM_UP))
            for letter, side in product(config.cases, listed):
                bar.set_postfix_str(f"{letter} {side.name} {side.dtype}")
                answer = side.engine.run(given[letter])
                bar.update()
                if number and answer:
                    cases[letter, side.dtype].take(side.name, answer)
        for side in listed:
            if isinstance(side.engine, ProcessEngine) and side.name == OURS:
                _set_bounds([case for case in cases.values() if case.dtype == side.dtype], side.engine)
    return list(cases.values())


def sides(config: EngineBench, model: Path) -> Iterator[Side]:
    """Before they are started."""
    threads = config.threads
    for dtype in config.dtypes:
        logs = {name: Path(config.run_dir, f"engine-{name}-{dtype}.log") for name in (OURS, *config.peers.pythons())}
        yield Side(OURS, dtype, ours(model, dtype, threads, logs[OURS]))
        for name, python in config.peers.pythons().items():
            yield Side(name, dtype, peer(name, python, model, dtype, threads, logs[name]))
        if config.peers.llama_cpp:
            yield Side(LLAMA_CPP, dtype, LlamaCpp(config.peers.llama_cpp, dtype, threads))


def _set_bounds(cases: Sequence[Case], engine: ProcessEngine) -> None:
    products, bandwidth = msgspec.convert(engine.ask({"products": True}), Products | None), read_bandwidth()
    for case in cases if products else ():
        case.products, case.memory = products.seconds(case.steps), products.bytes_read(case.steps) / bandwidth


def rows(cases: Sequence[Case]) -> Iterator[Row]:
    """Ours beside each bound, and each peer's with ours as its rival: how many times longer it takes, in per cent."""
    peers = [name for name in dict.fromkeys(name for case in cases for name in case.seconds) if name != OURS]
    for case in cases:
        yield Row(case.name, "time beside its products", case.time(), "s", bound=case.products)
        yield Row(case.name, "time beside its memory", case.time(), "s", bound=case.memory)
        for name in peers:
            yield Row(case.name, f"time of {shown(name, case.dtype)}", case.time(name), "s", rival=case.time())


def summary(cases: Sequence[Case]) -> Iterator[tuple[str, Goal]]:
    """Goals for the peers that took part, and for bf16 beside fp32."""
    for case in cases:
        for name in case.seconds:
            goal = GOALS.get((case.dtype, name), {}).get(case.letter)
            if goal is not None:
                yield f"{case.name}: {shown(name, case.dtype)} / ours", at_least(case.ratio(name), goal)
    wide = {case.letter: case for case in cases if case.dtype == "float32"}
    for case in cases:
        if case.dtype == "bfloat16" and case.letter in wide:
            yield f"{case.name} / float32", at_most(case.ratio(OURS, wide[case.letter]), SLOWER)


def shown(name: str, dtype: str) -> str:
    return f"{name} {FILES[dtype]}" if name == LLAMA_CPP else name


def turns(cases: Sequence[Case]) -> dict[str, Any]:
    """Every time that was measured."""
    return {case.name: {**case.seconds, "products": case.products, "memory": case.memory} for case in cases}
