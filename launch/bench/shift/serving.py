"""Drafters end to end after a shift: as they were before it, and as they have learnt from what came since."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from stepladder.launch.bench.shift.options import SUFFIX, ShiftBench
from stepladder.launch.bench.speculate.measures import Gain, gain
from stepladder.launch.bench.speculate.points import NONE, Case, Loaded, Point, Requests, measure
from stepladder.launch.bench.speculate.turns import Served, Side
from stepladder.launch.bench.speculate.watched import Watched
from stepladder.workers.core import Request
from stepladder.workers.engine import Engine
from stepladder.workers.speculation.drafters.hybrid import Hybrid
from stepladder.workers.speculation.drafters.lookup import Lookup
from stepladder.workers.speculation.head.files import Head, write_head

FROZEN, ONLINE = "frozen", "online"


class State(NamedTuple):
    """What drafting knows at some time: texts that have been written, and a head."""

    suffix: Lookup
    head: Head


@dataclass
class FrozenSide(Side):
    """Remembers nothing of what it serves."""

    def serve(self, engine: Engine, requests: Sequence[Request], at_once: int | None = None) -> Served:
        return super().serve(engine, [replace(request, learn=False) for request in requests], at_once)


class Shifted(NamedTuple):
    """point: every side over plain decoding. over_frozen: by drafter, as it has learnt over as it was at the shift."""

    point: Point
    over_frozen: dict[str, Gain]


def served(
    engine: Engine, config: ShiftBench, case: Case, states: Mapping[str, State], target: Loaded, requests: Requests,
    folder: Path,
) -> Shifted:  # fmt: skip
    """All sides in turns.

    Args:
        states: at the shift (`FROZEN`) and at the end of the stream (`ONLINE`). folder: for their heads.
    """
    sides = [Side(NONE)]
    for drafter in config.drafters:
        for when in (ONLINE,) if drafter == SUFFIX else (FROZEN, ONLINE):
            kind = FrozenSide if when == FROZEN else Side
            name = drafter if drafter == SUFFIX else f"{drafter} {when}"
            sides.append(kind(name, _watched(engine, config, drafter, states[when], target, folder / when)))
    last = config.drafters[-1]
    for k in config.fixed:
        watched = _watched(engine, config, last, states[ONLINE], target, folder / ONLINE, k)
        sides.append(Side(f"{last} {ONLINE} k={k}", watched))
    point = measure(engine, case, sides, requests)
    by_name = {side.name: side.served for side in sides}
    frozen = {name.removesuffix(f" {FROZEN}"): turns for name, turns in by_name.items() if name.endswith(FROZEN)}
    over = {name: gain(by_name[f"{name} {ONLINE}"], turns) for name, turns in frozen.items()}
    return Shifted(point, over)


def _watched(
    engine: Engine, config: ShiftBench, kind: str, state: State, target: Loaded, folder: Path, k: int | None = None
) -> Watched:
    """Made as a server makes it, with what is known by then."""
    if kind == SUFFIX:
        return Watched(deepcopy(state.suffix), config.speculate(kind, k=k))
    if not folder.exists():
        write_head(state.head, folder)
    options = config.speculate(kind, str(folder), k)
    drafter = options.drafter(engine.config, target)
    assert drafter is not None
    if isinstance(drafter, Hybrid):
        drafter.lookup = deepcopy(state.suffix)
    return Watched(drafter, options)
