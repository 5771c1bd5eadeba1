"""The rounds of one point: in each, every case has a turn, in an order of its own, and so has what it is made of."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

from stepladder.launch.bench.afd.real.model import Wire
from stepladder.launch.bench.afd.real.point import Point, Turn, cases, modules_task, tokens_task, transfer_task
from stepladder.launch.bench.afd.real.task import AFD, REPLICAS, Case, Decoded, Load, Modules, Task, Transfer
from stepladder.launch.bench.rig.processes import Ranks

T = TypeVar("T", Modules, Transfer)


class Measuring:
    """Measures points of one model; every round is also written to a file as soon as it is over.

    Args:
        apart, colocated: the rank processes of each kind of case, which never work at the same time.
        rounds: of a point, besides one that warms up.
        journal: gets a JSON line for every round.
    """

    def __init__(self, model: str, layers: int, apart: Ranks, colocated: Ranks, rounds: int, journal: Path) -> None:
        self._model, self._layers, self._apart, self._colocated = model, layers, apart, colocated
        self._rounds, self._journal, self._draw = rounds, journal, random.Random(0)

    def point(self, wire: Wire, load: Load, traced: Sequence[Case]) -> Point:
        """traced: disaggregated cases of which one more turn is taken, with its messages."""
        every = cases(load.batch)
        modules = dict.fromkeys(modules_task(case, load) for case in every)
        sending = [transfer_task(case, load) for case in every if case.kind != REPLICAS]
        transfers = dict.fromkeys([*sending, tokens_task(load)])
        rounds = []
        for number in range(self._rounds + 1):
            turned = {case: self._turn(case, load) for case in self._draw.sample(every, len(every))}
            alone = {task: self._alone(task) for task in modules}
            sent = {task: self._pair(task.case).ask(task, Transfer)[0] for task in transfers}
            if number:  # the first warms up
                rounds.append((turned, alone, sent))
                self._note(wire, load, turned)
        turns = {case: [turned[case] for turned, _, _ in rounds] for case in every}
        parts = _medians([alone for _, alone, _ in rounds]), _medians([sent for _, _, sent in rounds])
        watched = {case.name: self._apart.ask(Task("decode", load, case, traced=True), Decoded) for case in traced}
        return Point(self._model, self._layers, wire, load, turns, *parts, watched)

    def _turn(self, case: Case, load: Load) -> Turn:
        return Turn.of(case, self._pair(case).ask(Task("decode", load, case), Decoded))

    def _alone(self, task: Task) -> Modules:
        """One rank's share where ranks differ, the slower one's where they are alike."""
        pair, ranks = self._pair(task.case), (0, 1)
        answers = pair.ask(task, Modules) if task.together else [pair.ask(task, Modules, [r])[0] for r in ranks]
        return Modules(*(max(getattr(a, name) for a in answers) for name in ("attention", "ffn", "rest")))

    def _pair(self, case: Case) -> Ranks:
        return self._apart if case.kind == AFD else self._colocated

    def _note(self, wire: Wire, load: Load, turned: Mapping[Case, Turn]) -> None:
        steps = {case.name: turn.step * 1e3 for case, turn in turned.items()}
        line = {"model": self._model, "link": wire.name, "batch": load.batch, "TPOT_ms": steps}
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _medians(rounds: Sequence[Mapping[Task, T]]) -> dict[Task, T]:
    return {task: _median([found[task] for found in rounds]) for task in rounds[0]}


def _median(values: Sequence[T]) -> T:
    return type(values[0])(*(median(each) for each in zip(*(vars(v).values() for v in values), strict=True)))
