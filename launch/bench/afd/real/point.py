"""One model, one link, one batch: what every case took, and how long it would take if nothing waited in vain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from stepladder.launch.bench.afd.formula import Times, per_layer, pipeline
from stepladder.launch.bench.afd.real.model import Wire
from stepladder.launch.bench.afd.real.task import (
    AFD,
    COLOCATED,
    LADDER,
    LAG0,
    REPLICAS,
    TP,
    Case,
    Decoded,
    Load,
    Modules,
    Task,
    Transfer,
    micro_sizes,
)
from stepladder.launch.bench.overlap.bound import Parts, shortest_step
from stepladder.launch.bench.rig.paired import Ratio, paired_ratio
from stepladder.launch.bench.rig.spans import busy, exposed

PING_PONG = (1, 2, 3, 4)  # micro-batches
ONCE_PER_MICRO_BATCH = 0.7  # of a module's time with all rows takes half of them, where weights are what it reads


def cases(batch: int) -> list[Case]:
    """All that take turns."""
    return [LADDER, *(Case(AFD, 0, m) for m in PING_PONG if m <= batch), *COLOCATED]


@dataclass(frozen=True)
class Turn:
    """step, exposed: seconds of a decode step, and of these those in which neither rank computed, medians. busy: the
    share that each rank spent in its modules. tokens: [step][sequence]."""

    step: float
    exposed: float
    busy: tuple[float, float]
    tokens: list[list[int]]

    @classmethod
    def of(cls, case: Case, answers: Sequence[Decoded]) -> "Turn":
        """Both ranks' answers as one turn: a step of AFD is as long as A's, one of TP as long as the slower rank's.
        Replicas never wait for each other: they take as long as the typical step of the slower one."""
        a, b = answers
        windows = [a.steps, a.steps if case.kind == AFD else b.steps]
        steps = [[end - begin for begin, end in window] for window in windows]
        step = median(max(both) for both in zip(*steps, strict=True))
        tokens = a.tokens
        if case.kind == REPLICAS:
            step = max(median(each) for each in steps)
            tokens = [mine + others for mine, others in zip(a.tokens, b.tokens, strict=True)]
        shares = (busy(a.compute, windows[0]), busy(b.compute, windows[1]))
        return cls(step, exposed([*a.compute, *b.compute], windows[0]), shares, tokens)


class Bound(NamedTuple):
    """Seconds of a step in which nothing waits but for what it needs, and of a layer in the steady state (AFD only)."""

    step: float
    layer: float | None


def modules_task(case: Case, load: Load) -> Task:
    """Its modules alone. Only lag 0 with one micro-batch never has both ranks at work at once."""
    rows = micro_sizes(load.batch, case.micro_batches)[0]
    return Task("modules", load, Case(case.kind, 0), rows, together=case != LAG0)


def transfer_task(case: Case, load: Load) -> Task:
    """One of its messages, or reduces, alone."""
    return Task("transfer", load, Case(case.kind, 0), micro_sizes(load.batch, case.micro_batches)[0])


def tokens_task(load: Load) -> Task:
    """A reduce of one row alone: as small, where a link is concerned, as that in which TP ranks agree on tokens."""
    return Task("transfer", load, Case(TP, 0), 1)


@dataclass(frozen=True)
class Point:
    """turns: of every case, by round. modules, transfers: by task, the medians of the rounds. traced: if asked for, by
    case, both ranks' answers of one more turn."""

    model: str
    layers: int
    wire: Wire
    load: Load
    turns: dict[Case, list[Turn]]
    modules: dict[Task, Modules]
    transfers: dict[Task, Transfer]
    traced: dict[str, list[Decoded]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.wire.name}, batch {self.load.batch}"

    def step(self, case: Case) -> float:
        """TPOT in seconds."""
        return median(turn.step for turn in self.turns[case])

    def exposed(self, case: Case) -> float:
        """Seconds of a step in which neither rank computes."""
        return median(turn.exposed for turn in self.turns[case])

    def busy(self, case: Case) -> tuple[float, float]:
        """The share of a step that each rank spends in its modules."""
        first, second = (median(shares) for shares in zip(*(turn.busy for turn in self.turns[case]), strict=True))
        return first, second

    def ratio(self, slow: Case, fast: Case) -> Ratio:
        """Of turns of the same round."""
        return paired_ratio(*([turn.step for turn in self.turns[case]] for case in (slow, fast)))

    def parts(self, case: Case) -> tuple[Modules, Transfer]:
        """What the case is made of; replicas send nothing."""
        sent = self.transfers.get(transfer_task(case, self.load), Transfer(0.0, 0.0))
        return self.modules[modules_task(case, self.load)], sent

    def times(self, case: Case) -> Times:
        """Where a part of a message passes a token bucket at once, a second one is later than a lone one takes, but not
        after a silence, and lag 0 has those: the lone one's time is true of all, if low."""
        modules, sent = self.parts(case)
        spacing = min(sent.spacing, sent.one)
        return Times(attention=modules.attention, ffn=modules.ffn, transfer=sent.one, spacing=spacing)

    def rest(self, case: Case) -> float:
        """Seconds of a step that are neither block nor communication."""
        return case.micro_batches * self.parts(case)[0].rest

    def bound(self, case: Case) -> Bound:
        """AFD: launch/bench/afd/formula.py. TP: launch/bench/overlap/bound.py and one small reduce, for the tokens."""
        modules, sent = self.parts(case)
        if case.kind == AFD:
            times, m = self.times(case), case.micro_batches
            return Bound(pipeline(times, case.lag, m, self.layers) + self.rest(case), per_layer(times, case.lag, m))
        if case.kind == REPLICAS:
            return Bound(self.layers * (modules.attention + modules.ffn) + modules.rest, None)
        parts = Parts(modules.attention, modules.ffn, sent.one, sent.spacing, modules.rest, self.layers)
        tokens = self.transfers[tokens_task(self.load)].one
        return Bound(shortest_step(parts, "ladder" if case.lag else "standard") + tokens, None)

    def layer(self, case: Case) -> float:
        """Measured seconds of a layer of AFD, a share of filling and draining included."""
        return (self.step(case) - self.rest(case)) / self.layers

    @property
    def best_ping_pong(self) -> Case:
        """The fastest lag 0, whatever its number of micro-batches."""
        return min((c for c in self.turns if c.kind == AFD and not c.lag), key=self.step)

    @property
    def weight(self) -> float:
        """2 tC over the mean module."""
        times = self.times(LADDER)
        return 4 * times.transfer / (times.attention + times.ffn)

    @property
    def far(self) -> float:
        """How many times 2 tC is one module's time, or one module's time 2 tC: 1 or more."""
        return max(self.weight, 1 / self.weight)

    @property
    def in_a_burst(self) -> bool:
        """Whether a tenth of a lone message or more passes a shaped link's token bucket at once: then lag 0, whose
        messages come after silences, is not slowed by the link, and only ladder is."""
        sent = self.parts(LADDER)[1]
        return self.wire.rate is not None and sent.spacing > 1.1 * sent.one

    @property
    def of_half(self) -> float:
        """The share of a module's time with all rows that it takes with half of them: 1 where all it does is read."""
        whole, half = (self.modules[modules_task(Case(AFD, lag, m), self.load)] for lag, m in ((1, 1), (0, 2)))
        return (half.attention + half.ffn) / (whole.attention + whole.ffn)

    @property
    def alike(self) -> float:
        """The share of sequences that all cases of a wiring continue with the same tokens."""
        same = []
        for lag in (0, 1):
            tokens = [turns[0].tokens for case, turns in self.turns.items() if case.lag == lag]
            sequences = [list(zip(*each, strict=True)) for each in tokens]
            same += [len(set(each)) == 1 for each in zip(*sequences, strict=True)]
        return sum(same) / len(same)


def regime(point: Point, points: Sequence[Point]) -> str:
    """What a step is made of: latency, if a message is longer under way than a module takes; else reading weights, if
    half of the rows take most of the time that all of them do; else arithmetic.

    Modules know nothing of the link, so one model's and batch's `points` have one answer between the latter two.
    """
    if point.weight > 2:
        return "latency-bound"
    alike = [p.of_half for p in points if (p.model, p.load.batch) == (point.model, point.load.batch)]
    return "memory-bound" if median(alike) >= ONCE_PER_MICRO_BATCH else "compute-bound"
