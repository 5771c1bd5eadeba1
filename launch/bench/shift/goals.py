"""What must hold after a shift, by model: SmolLM2, and the bundled model with layers of no effect or without."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stepladder.launch.bench.shift.curves import Curve
from stepladder.launch.bench.shift.options import SUFFIX, ShiftBench
from stepladder.launch.bench.shift.serving import ONLINE, Shifted
from stepladder.launch.bench.shift.shapes import SHARP, SMOOTH
from stepladder.launch.bench.shift.streams import Streamed
from stepladder.launch.report import Goal, at_least, at_most

NO_LOSS = 0.97  # of plain decoding
KEPT = 0.9  # of what the old kind was accepted
FAR = 0.2  # of acceptance between a drafter that never saw the new kind and one that saw it all
REGAINED = {150: 0.7, 500: 0.9}  # of a far shift, within so many requests
NEAR_ORACLE, SOON = 0.03, 1000
LEARNER = "online"


class Bar(NamedTuple):
    """Of one drafter as it has learnt, tokens per second: over plain decoding, and over itself at the shift."""

    none: float | None = None
    frozen: float | None = None


HYBRID = {  # by model, kind, temperature, batch
    ("smollm2", "tables", 0.0, 1): Bar(1.6, 1.25),
    ("smollm2", "code", 0.0, 1): Bar(1.45, 1.25),
    ("smollm2", "prose", 0.0, 1): Bar(1.25, 1.25),
    ("smollm2", "tables", 1.0, 1): Bar(1.1, 1.03),
    ("smollm2", "code", 1.0, 1): Bar(1.2, 1.1),
    ("demo", "tables", 1.0, 1): Bar(1.6),
    ("demo", "prose", 1.0, 1): Bar(1.1),
    ("demo-inflated", "tables", 1.0, 1): Bar(2.2, 1.8),
    ("demo-inflated", "tables", 1.0, 8): Bar(1.4),
}
HEAD = {0.0: (0.18, 0.6), 1.0: (0.04, 0.45)}  # SmolLM2: what acceptance gains, and of the gap to the oracle


def summary(config: ShiftBench, streams: Sequence[Streamed], points: Sequence[Shifted]) -> Iterator[tuple[str, Goal]]:
    for stream in streams:
        online = stream.curves[LEARNER]
        if stream.shape == SHARP:
            yield from _sharp(config, stream, online)
        if stream.shape == SMOOTH:
            yield from _smooth(config, stream)
    differ = sum(sum(one.point.differing.values()) for one in points)
    if points:
        yield "texts that differ from plain decoding's", at_most(differ, 0)
    for one in points:
        yield from _served(config, one)


def _sharp(config: ShiftBench, stream: Streamed, online: Curve) -> Iterator[tuple[str, Goal]]:
    t = stream.temperature
    assert stream.oracle is not None
    static, oracle = stream.static[0].at(t), stream.oracle[0].at(t)
    gap = oracle - static
    shares = {look.come: (look.new.at(t) - static) / gap for look in online.looks if gap > 0}
    last = online.looks[-1]
    if config.model.name == "smollm2":
        gained, share = HEAD.get(t, (None, None))
        if gained is not None and share is not None:
            yield f"{stream.name}: acceptance gained in {last.come} requests", at_least(last.new.at(t) - static, gained)
            yield f"{stream.name}: of the gap to the oracle", at_least(shares.get(last.come), share)
    elif gap >= FAR:
        for within, bar in REGAINED.items():
            if looks := [come for come in shares if come <= within]:
                yield f"{stream.name}: of the gap, {max(looks)} requests", at_least(shares[max(looks)], bar)
        if soon := [look for look in online.looks if look.come <= SOON]:
            lacks = oracle - soon[-1].new.at(t)
            yield f"{stream.name}: below the oracle, {soon[-1].come} requests", at_most(lacks, NEAR_ORACLE)
    old = stream.static[1].at(t)
    if old:
        yield f"{stream.name}: of the old kind's acceptance", at_least(last.old.at(t) / old, KEPT)


def _smooth(config: ShiftBench, stream: Streamed) -> Iterator[tuple[str, Goal]]:
    """In the second half, over the best of those that are taught no more by then."""
    half, end, t = config.stream // 2, config.stream, stream.temperature
    means = {name: curve.mean(half, end, t) for name, curve in stream.curves.items()}
    learning = means.pop(LEARNER)
    others = {name: mean for name, mean in means.items() if not name.startswith(LEARNER)}
    best = max(others, key=lambda name: others[name])
    yield f"{stream.name}: second half, over {best}", at_least(learning / others[best] if others[best] else None, 1.0)


def _served(config: ShiftBench, one: Shifted) -> Iterator[tuple[str, Goal]]:
    case, gains = one.point.case, one.point.gains
    bar = HYBRID.get((config.model.name, case.kind, case.temperature, case.batch), Bar())
    hybrid = f"hybrid {ONLINE}"
    if bar.none and hybrid in gains:
        yield f"{case.name}: {hybrid} / none", at_least(gains[hybrid].value, bar.none)
    if bar.frozen and "hybrid" in one.over_frozen:
        yield f"{case.name}: {hybrid} / frozen", at_least(one.over_frozen["hybrid"].value, bar.frozen)
    least = min(gain.value for name, gain in gains.items() if ONLINE in name or name == SUFFIX)
    yield f"{case.name}: least over none", at_least(least, NO_LOSS)
