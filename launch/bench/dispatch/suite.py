"""suite=dispatch: a Ladder mixture of experts over shaped links: attention on one host and experts on two, with the
rows sent to every F rank or to their home, beside tensor parallelism over two hosts. Which is ahead where, and why.

Hosts are network namespaces, three ranks share this machine's cores, and weights are random: what is real is what goes
over the links, of which every host counts the bytes. A link bounds a step: it takes no less than the bytes of the
busiest host, in the busier direction, take at its rate.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from stepladder.launch.bench.afd.real.task import Load
from stepladder.launch.bench.dispatch.rank import BROADCAST, HOME, KINDS, TP, Task, Turn
from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.hosts import Hosts, Link
from stepladder.launch.bench.rig.paired import Ratio, paired_ratio
from stepladder.launch.bench.rig.processes import Ranks, Start
from stepladder.launch.report import Goal, Report, Row
from stepladder.launch.typed_config import check_counts
from stepladder.parallel.checkpoint import save_weights
from stepladder.parallel.experts import ExpertSpec
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.spec import ModelSpec

HOSTS, PROCESS = 3, "stepladder.launch.bench.dispatch.rank"
COLOURS = {TP: "#4477aa", BROADCAST: "#eecc66", HOME: "#228833"}
EMULATED = "links shaped by tc-tbf; three ranks share the machine's cores"


@dataclass(frozen=True, kw_only=True)
class DispatchBench:
    """Options.

    Attributes:
        hidden, inner, layers, heads, kv_heads, vocab, experts, per_token: of the model. rates: of each host's link in
            Mbit/s; null for unshaped. batches: sequences that are decoded together. context: cached tokens of each.
        steps: of a turn, besides one that warms up. rounds: in each, every case has a turn.
    """

    name: str
    run_dir: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int
    per_token: int
    rates: list[float | None]
    batches: list[int]
    context: int
    steps: int
    rounds: int

    def __post_init__(self) -> None:
        check_counts(self, "hidden", "inner", "layers", "heads", "vocab", "context", "steps", "rounds")
        if not self.rates or not self.batches or min(self.batches) < 2:
            raise ValueError("rates and batches must each name at least one; batches of at least 2")
        if self.experts < 2:
            raise ValueError(f"experts is {self.experts}; two F ranks need at least 2")

    @property
    def spec(self) -> ModelSpec:
        experts = ExpertSpec(
            layers=tuple(range(self.layers)), count=self.experts, per_token=self.per_token, inner=self.inner
        )
        return ModelSpec(
            family="mixtral", vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.inner,
            num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.kv_heads, experts=experts,
            head_dim=self.hidden // self.heads, max_position=1 << 16, tie_embeddings=True, residual="ladder",
        )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One link and batch. turns: by kind and round, of all three ranks."""

    rate: float | None
    batch: int
    turns: dict[str, list[list[Turn]]]

    @property
    def name(self) -> str:
        link = "unshaped links" if self.rate is None else f"links of {self.rate:g} Mbit/s"
        return f"{link}, batch {self.batch}"

    def steps(self, kind: str) -> list[float]:
        """Seconds of a step, as rank 0 sees it, by round."""
        return [median(ranks[0].steps) for ranks in self.turns[kind]]

    def step(self, kind: str) -> float:
        return median(self.steps(kind))

    def busiest(self, kind: str) -> float:
        """Bytes of a step through the busiest link, in the busier direction."""
        return median(max(max(turn.sent, turn.received) for turn in ranks) for ranks in self.turns[kind])

    def bound(self, kind: str) -> float | None:
        """Seconds that these bytes take."""
        return self.busiest(kind) * 8 / (self.rate * 1e6) if self.rate else None

    def ratio(self, kind: str) -> Ratio:
        """Of a step over TP's, of turns of the same round."""
        return paired_ratio(self.steps(kind), self.steps(TP))

    @property
    def alike(self) -> float:
        """The share of sequences that all kinds continue with the same tokens."""
        texts = [list(zip(*self.turns[kind][0][0].tokens, strict=True)) for kind in KINDS]
        same = [len(set(each)) == 1 for each in zip(*texts, strict=True)]
        return sum(same) / len(same)


def run(config: DispatchBench) -> Report:
    """Raises ValueError where there are no network namespaces, or a model that cannot be."""
    if why := netns.unavailable():
        raise ValueError(f"suite=dispatch needs network namespaces; {why}")
    spec, points = config.spec, list[Point]()
    with TemporaryDirectory() as folder, Hosts(HOSTS) as hosts:
        model = Transformer(spec)
        init_weights(model, spec, seed=0)
        save_weights(model, folder, spec.dtype)
        Path(folder, "config.json").write_text(json.dumps(spec.to_config()))
        total = len(config.rates) * len(config.batches) * config.rounds
        with Ranks(PROCESS, [Start(folder)] * HOSTS, hosts) as ranks, tqdm(total=total, unit="round") as bar:
            for rate in config.rates:
                for host in hosts:
                    host.shape(Link(rate=rate))
                points += [_point(config, rate, batch, ranks, bar) for batch in config.batches]
    return Report("dispatch", list(_rows(points)), dict(_summary(points)), EMULATED, draw=lambda f: _draw(f, points))


def _point(config: DispatchBench, rate: float | None, batch: int, ranks: Ranks, bar: tqdm) -> Point:
    load = Load(batch, config.context, config.steps, 0.0)
    turns: dict[str, list[list[Turn]]] = {kind: [] for kind in KINDS}
    for _ in range(config.rounds):
        for kind in KINDS:
            turns[kind].append(ranks.ask(Task(kind, load), Turn, range(HOSTS)))
        bar.update()
    return Point(rate, batch, turns)


def _rows(points: Sequence[Point]) -> Iterator[Row]:
    for point in points:
        for kind in KINDS:
            bound, case = point.bound(kind), f"{point.name}: {kind}"
            yield Row(case, "TPOT", point.step(kind) * 1e3, "ms", bound and bound * 1e3, point.step(TP) * 1e3)
            ratio = point.ratio(kind)
            yield Row(case, "TPOT over TP 2's", ratio.median, "", interval=(ratio.low, ratio.high))
            yield Row(case, "busiest link", point.busiest(kind) / 1e3, "kB/step", rival=point.busiest(TP) / 1e3)
        yield Row(point.name, "sequences that all continue alike", point.alike * 100, "%")


def _summary(points: Sequence[Point]) -> Iterator[tuple[str, Goal]]:
    """Who is ahead at each point, and whether bytes said so. Closer than a twentieth, they need not."""
    for point in points:
        ahead = min(KINDS, key=point.step)
        fewest = min(KINDS, key=point.busiest)
        said = point.rate is None or point.step(fewest) <= 1.05 * point.step(ahead)
        goal = "the fewest bytes are ahead" if point.rate else "no bound"
        yield f"{point.name}: {ahead} is ahead, its TPOT over TP 2's", Goal(point.ratio(ahead).median, goal, said)


def _draw(figure: Any, points: Sequence[Point]) -> None:
    """A panel per batch: TPOT of each kind over TP's by link, and the bounds' ratio beside it."""
    batches = list(dict.fromkeys(point.batch for point in points))
    figure.set_size_inches(4.6 * len(batches), 3.6)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        mine = [point for point in points if point.batch == batch]
        for kind in KINDS:
            ratios = [point.ratio(kind) for point in mine]
            error = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
            axes.errorbar(range(len(mine)), [r.median for r in ratios], error, fmt="o-", ms=4, capsize=2,
                          color=COLOURS[kind], label=kind)  # fmt: skip
            bounds = [(x, point.busiest(kind) / point.busiest(TP)) for x, point in enumerate(mine) if point.rate]
            if bounds:
                axes.scatter(*zip(*bounds, strict=True), marker="_", s=200, color=COLOURS[kind])
        axes.scatter([], [], marker="_", s=90, color="black", label="ratio of bytes")
        axes.set_xticks(range(len(mine)), ["unshaped" if p.rate is None else f"{p.rate:g} Mbit/s" for p in mine])
        axes.set_title(f"batch {batch}", fontsize="medium")
        axes.set_ylabel("TPOT over TP 2's")
        axes.legend(fontsize="x-small")
        axes.grid(axis="y", alpha=0.3)


SUITE = DispatchBench, run
