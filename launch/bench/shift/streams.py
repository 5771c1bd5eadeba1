"""One shift after another: what the target answers, and everybody in the same stream of it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from stepladder import LLM
from stepladder.launch.bench.shift.answers import Answer, asked, recorded
from stepladder.launch.bench.shift.curves import Curve, Found, Others, drawn
from stepladder.launch.bench.shift.options import AT_ONCE, SUFFIX, ShiftBench
from stepladder.launch.bench.shift.serving import FROZEN, ONLINE, State
from stepladder.launch.bench.shift.shapes import ALONE, NEW, OLD, OTHER, SHAPES, SHARP, SMOOTH
from stepladder.launch.bench.shift.students import Distilled, Online, Student, until_no_better
from stepladder.launch.bench.speculate.points import LEARNED, SETTLED, Loaded, Requests
from stepladder.launch.bench.speculate.turns import Side
from stepladder.launch.bench.speculate.watched import Watched
from stepladder.workers.assembly import Target
from stepladder.workers.core import Request
from stepladder.workers.source.resolve import resolve
from stepladder.workers.speculation.drafters.lookup import Lookup
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.training.ranks import Ranks

STATIC, ALL, ERRORS, DISTILLED = "static", "online", "online, errors", "a tenth, then static"


class Streamed(NamedTuple):
    """What became of one stream. static, oracle: on requests that nobody learns from, the new kind's and the old one's;
    the oracle of a sharp stream alone, with the steps that it was taught."""

    kind: str
    temperature: float
    shape: str
    curves: dict[str, Curve]
    static: tuple[Found, Found]
    oracle: tuple[Found, Found] | None = None
    oracle_steps: int = 0

    @property
    def name(self) -> str:
        sampling = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.kind}, {sampling}, {self.shape}"


class Texts(NamedTuple):
    """Answers of one kind and temperature, by what they are for. suffixes: what looking up knows at the shift and after
    the stream."""

    before: list[Answer]
    new: list[Answer]
    old: list[Answer]
    other: list[Answer]
    judged_new: list[Answer]
    judged_old: list[Answer]
    suffixes: tuple[Lookup, Lookup]


class Bench:
    """What all cases share."""

    def __init__(self, config: ShiftBench, ranks: Ranks, told: Callable[[str, int], object]) -> None:
        self.config, self.ranks, self.told = config, ranks, told
        self.directory = Path(resolve(config.model.path, cache=config.model.cache, fetching=True, progress=True))
        most = max(LEARNED, *config.batches)
        self.llm = LLM(str(self.directory), "cpu", config.kv_tokens, threads=config.threads, max_sequences=most)
        self.loaded = Loaded(Target(self.llm.engine.executor))
        self.target = TargetVocabulary(self.llm.engine.executor.model.spec, self.directory)
        self._before: dict[float, tuple[list[Answer], Lookup]] = {}

    # What the target answers.

    def texts(self, kind: str, temperature: float) -> tuple[Texts, Requests]:
        """Recorded; and requests for serving end to end."""
        config = self.config
        smooth = SHAPES[SMOOTH](config.stream, config.seed) if SMOOTH in config.shapes else []
        settling = max(SETTLED, *config.batches)
        measured = max(config.requests, *config.batches) if config.requests else 0
        sizes = {
            kind: config.stream + config.judged + settling + measured,
            config.source: config.before + config.judged + smooth.count(OLD),
            **({config.third(kind): smooth.count(OTHER)} if OTHER in smooth else {}),
        }
        requests = asked(self.llm, sizes, temperature, config)
        of_kind, of_source = requests[kind], requests[config.source]
        at, rest = config.stream, config.before + config.judged
        if temperature not in self._before:
            side = self._recording()
            self._before[temperature] = self._recorded(of_source[: config.before], side), _known(side)
        before, at_shift = self._before[temperature]
        side = self._recording(deepcopy(at_shift))
        new = self._recorded(of_kind[:at], side)
        plain = Side("recording")
        texts = Texts(
            before,
            new,
            self._recorded(of_source[rest:], plain),
            self._recorded(requests.get(config.third(kind), []), plain),
            self._recorded(of_kind[at : at + config.judged], plain),
            self._recorded(of_source[config.before : rest], plain),
            (at_shift, _known(side)),
        )
        left = of_kind[at + config.judged :]
        return texts, Requests([], left[:settling], left[settling:])

    def _recording(self, known: Lookup | None = None) -> Side:
        """Looks texts up while they are recorded, as a server does."""
        options = self.config.speculate(SUFFIX)
        drafter = known or options.drafter(self.llm.engine.config, self.loaded)
        assert drafter is not None
        return Side("recording", Watched(drafter, options))

    def _recorded(self, requests: Sequence[Request], side: Side) -> list[Answer]:
        return recorded(self.llm, requests, side, lambda count: self.told("recording", count)) if requests else []

    # Who learns from them.

    def online(self, name: str, errors: bool = False) -> Online:
        return Online(name, self.target, self.directory, self.ranks, self.config.train, errors)

    def taught(self, name: str, answers: Sequence[Answer], errors: bool = False) -> Online:
        """One that has learnt from these."""
        student = self.online(name, errors)
        for first in range(0, len(answers), AT_ONCE):
            student.take(answers[first : first + AT_ONCE])
            self.told("before the shift", len(answers[first : first + AT_ONCE]))
        if not student.begun:
            least = student.learner.places_to_fit
            raise ValueError(f"before is {self.config.before}; a head begins with {least} places of answers")
        return student

    def streamed(self, shape: str, kind: str, temperature: float, texts: Texts) -> tuple[Streamed, dict[str, State]]:
        """Everybody in one stream; and what drafting knows at its beginning and end, of who learns from all of it."""
        config = self.config
        learner = self.online(ALL) if shape == ALONE else self.taught(ALL, texts.before)
        static = self.taught(STATIC, texts.before) if shape == ALONE else learner
        frozen = static.head
        others = Others.of(texts.judged_new, texts.judged_old, self.target)
        students: list[Student] = [Student(STATIC, frozen), learner]
        if config.errors:
            students.append(self.online(ERRORS, True) if shape == ALONE else self.taught(ERRORS, texts.before, True))
        if config.distilled:
            students.append(Distilled(DISTILLED, frozen, self.target, config.train, config.stream, config.oracle))
        came = {NEW: iter(texts.new), OLD: iter(texts.old), OTHER: iter(texts.other)}
        stream = [next(came[each]) for each in SHAPES[shape](config.stream, config.seed)]
        curves = drawn(students, stream, config.all_looks, others, self.target, lambda came: self.told(shape, came))
        oracle, steps = None, 0
        if shape == SHARP:
            best, steps = until_no_better(frozen, self.target, texts.new, others.new, config.train, config.oracle)
            oracle = others.judge(best)
        states = {FROZEN: State(texts.suffixes[0], frozen), ONLINE: State(texts.suffixes[1], learner.head)}
        for student in {*students, static}:
            if isinstance(student, Online):
                student.learner.close()
        return Streamed(kind, temperature, shape, curves, others.judge(frozen), oracle, steps), states


def _known(side: Side) -> Lookup:
    """A copy of what it looks up in."""
    assert side.speculator is not None and isinstance(side.speculator.drafter, Lookup)
    return deepcopy(side.speculator.drafter)
