"""The real part: should we disaggregate? Two ranks, one core each, on two hosts made of network namespaces.

Real models decode greedily in two processes with gloo between them, no Ray and no HTTP: ladder AFD; ping-pong with one
to four micro-batches of the same batch; tensor parallelism over the same link; two replicas with half of it each.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from stepladder.launch.bench.afd.real.measure import Measuring
from stepladder.launch.bench.afd.real.model import Model, Wire
from stepladder.launch.bench.afd.real.point import Point
from stepladder.launch.bench.afd.real.task import LADDER, LAG0, Load
from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.hosts import Hosts
from stepladder.launch.bench.rig.processes import Ranks, Start
from stepladder.launch.typed_config import check_counts

PROCESSES = ("stepladder.launch.bench.afd.real.apart", "stepladder.launch.bench.afd.real.colocated")


@dataclass(frozen=True, kw_only=True)
class RealOptions:
    """context: cached tokens of each sequence. steps: of a turn, besides one that warms up. rounds: in each, every case
    has a turn."""

    models: list[Model]
    context: int
    steps: int
    rounds: int

    def __post_init__(self) -> None:
        check_counts(self, "context", "steps", "rounds", where="real.")
        if not self.models:
            raise ValueError("real.models is empty; name at least one, or leave `real` out of parts")

    def load(self, batch: int, wire: Wire) -> Load:
        return Load(batch, self.context, self.steps, wire.late_ms / 1e3)

    def check_models(self) -> None:
        """All of them before the first is measured, which takes long; not in `__post_init__`, since checkpoints need
        not be there for the emulated part.

        Raises:
            ValueError: a model is not there, or takes fewer positions.
        """
        longest = self.context + self.steps + 1
        for model in self.models:
            if longest > (positions := model.spec.max_position):
                sequences = f"context and steps make {longest}; lower context"
                raise ValueError(f"model {model.name} takes {positions} positions, but {sequences}")


def measure(options: RealOptions, journal: Path, trace: bool) -> list[Point]:
    """All points. journal: where every round is written to at once. trace: also of ladder AFD and of lag 0 with m = 1.

    Raises:
        ValueError: there are no network namespaces to be had here, or no two cores; or `options.check_models` does.
    """
    if why := netns.unavailable():
        raise ValueError(f"suite=afd needs network namespaces for real models, or parts=[emulated]; {why}")
    options.check_models()
    on = cores()
    journal.parent.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    traced = (LADDER, LAG0) if trace else ()
    total = sum(len(model.wires) * len(model.batches) for model in options.models)
    with Hosts(2) as hosts, tqdm(total=total, unit="point") as bar:
        for model in options.models:
            with ExitStack() as stack:
                path = model.directory(Path(stack.enter_context(TemporaryDirectory())))
                starts = [Start(str(path), core=core) for core in on]
                apart, colocated = (stack.enter_context(Ranks(process, starts, hosts)) for process in PROCESSES)
                measuring = Measuring(model.name, model.spec.num_layers, apart, colocated, options.rounds, journal)
                for wire in model.wires:
                    for host in hosts:
                        host.shape(wire)
                    for batch in model.batches:
                        bar.set_postfix_str(f"{model.name}, {wire.name}, batch {batch}")
                        points.append(measuring.point(wire, options.load(batch, wire), traced))
                        bar.update()
    return points


def cores() -> list[int]:
    """Two, one for each rank.

    Raises:
        ValueError: this process may run on fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise ValueError(f"suite=afd takes two cores for real models, and this process may run on {len(allowed)} only")
    return allowed[:2]
