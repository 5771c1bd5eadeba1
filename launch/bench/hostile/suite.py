"""Suite `hostile`: a deployment is attacked while honest streams run, and must let nobody feel it.

Two phases without an attack come first: the same streams, for what a pause is on this machine at this hour, and their
texts. Then strangers send forged requests (`fuzz.py`) and misuse connections (`connections.py`). No answer may be above
499 but 503, nothing may have been started again, no stream may pause much longer than before, every text must be the
same, and once all is over the processes must be about as large as before. Only servers on this machine are attacked:
the suite starts its own.
"""

import os
import secrets
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from time import monotonic, sleep
from typing import Any

from stepladder.launch.bench.hostile.attacker import Outcome, Plan, is_fault, under_attack
from stepladder.launch.bench.hostile.figure import by_status, draw
from stepladder.launch.bench.hostile.honest import HonestStreams, Phase
from stepladder.launch.bench.hostile.memory import MemoryWatch
from stepladder.launch.bench.hostile.options import HostileBench
from stepladder.launch.bench.hostile.replay import door_of, target_of
from stepladder.launch.bench.hostile.starved import Starvation
from stepladder.launch.report import Goal, Report, Row, at_most

FIRST, SECOND, ATTACKED, AFTER = "undisturbed 1", "undisturbed 2", "attacked", "after"
SETTLED_SECONDS = 3.0  # of memory that is looked at before the attack, and once all is over


@dataclass(frozen=True)
class Seen:
    """All that was seen.

    Attributes:
        phases: by name. outcome: of the attack.
        starvation: for what the machine adds to a pause where others use it too.
        times: when the attack began and ended, and when all had settled (`monotonic`).
        crashes: what was started again or is not as it was, a sentence each.
        left: requests and connections that are still under way, after everybody has gone.
        files: that the gateway has open, before and after.
    """

    phases: dict[str, Phase]
    outcome: Outcome
    memory: MemoryWatch
    starvation: Starvation
    times: tuple[float, float, float]
    crashes: list[str]
    left: int
    files: tuple[int, int]


def run(config: HostileBench) -> Report:
    """Raises RuntimeError if the deployment does not come up; that it does not stay up is a result."""
    # Ray reads these once, when it is imported; they must be the private Ray's
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    from stepladder.launch.bench.failures.deployment_under_test import deployed
    from stepladder.launch.bench.hostile.vitals import Vitals

    with deployed("hostile", f"{config.run_dir}/serve", config.ray_cpus, config.options) as victim:
        vitals = Vitals(victim)
        target = target_of(victim.url)
        streams = HonestStreams(victim.url, target.model, config.streams, config.tokens, config.answer_seconds)
        plan = Plan(door_of(victim.url), target, config.seed, config.seconds, config.requests, config.clients,
                    config.intruders, config.answer_seconds)  # fmt: skip
        phases: dict[str, Phase] = {}
        with MemoryWatch(vitals.processes) as memory, Starvation(vitals.processes) as starvation:
            for name in (FIRST, SECOND):
                with streams.phase(name) as phases[name]:
                    sleep(config.quiet_seconds)
            files = vitals.files()
            with streams.phase(ATTACKED) as phases[ATTACKED], under_attack(plan) as future:
                outcome = future.result()
            left = vitals.settle(config.settle_seconds)
            with streams.phase(AFTER) as phases[AFTER]:
                pass
            vitals.settle(config.settle_seconds)
            sleep(SETTLED_SECONDS)
        times = (outcome.began, outcome.ended, monotonic())
        seen = Seen(phases, outcome, memory, starvation, times, vitals.crashes(), left, (files, vitals.files()))
        victim.cluster.job("stop", victim.name)
    return report(config, seen)


def report(config: HostileBench, seen: Seen) -> Report:
    """What it all comes to."""
    rows = [row for phase in seen.phases.values() for row in _rows_of(config, phase, seen)]
    rows += [row for what, counts in sorted(seen.outcome.answers.items()) for row in _answers(what, counts)]
    sizes = {name: _size(seen, name) for name in seen.memory.samples}
    rows += [row for name, size in sizes.items() for row in size.rows(name, config)]
    rows.append(Row("gateway", "open files", seen.files[1], "files", rival=seen.files[0]))
    summary = _answered(seen) | _felt(config, seen) | _flat(config, sizes)
    details = {"phases": {name: asdict(phase) for name, phase in seen.phases.items()}, "faults": _faults(seen)}
    picture = partial(
        draw,
        pauses={name: seen.phases[name].pauses for name in (FIRST, SECOND, ATTACKED)},
        bounds=[usual + config.pause_seconds for usual in usual_pauses(seen.phases)],
        answers=by_status(seen.outcome.answers),
        memory=seen.memory.samples,
        attack=seen.times[:2],
    )
    return Report("hostile", rows, summary, details=details, draw=picture)


def usual_pauses(phases: dict[str, Phase]) -> list[float]:
    """By stream, the longest pause of both phases without an attack."""
    return [max(pair) for pair in zip(phases[FIRST].pauses, phases[SECOND].pauses, strict=True)]


def excess(phases: dict[str, Phase]) -> float:
    """Seconds by which a stream under attack paused longer than it ever did before; of the worst, at least 0."""
    both = zip(phases[ATTACKED].pauses, usual_pauses(phases), strict=True)
    return max(0.0, *(pause - usual for pause, usual in both))


@dataclass(frozen=True)
class Size:
    """Of one process, in MiB, medians of a while; None if it was gone.

    Attributes:
        before: the attack. after: all had settled.
        second, last: in those quarters of the attack; in the first one, much is used for the first time.
    """

    before: float | None
    second: float | None
    last: float | None
    after: float | None

    @property
    def growth(self) -> float | None:
        return self.after - self.before if self.after is not None and self.before is not None else None

    @property
    def leak(self) -> float | None:
        return self.last - self.second if self.last is not None and self.second is not None else None

    def rows(self, name: str, config: HostileBench) -> list[Row]:
        return [
            Row(name, "memory before", self.before, "MiB"),
            Row(name, "memory, second quarter of the attack", self.second, "MiB"),
            Row(name, "memory, last quarter of the attack", self.last, "MiB", (self.second or 0.0) + config.leak_mib),
            Row(name, "memory after", self.after, "MiB", (self.before or 0.0) + config.growth_mib),
        ]


def _size(seen: Seen, name: str) -> Size:
    began, ended, settled = seen.times
    quarter, usual = (ended - began) / 4, seen.memory.median
    return Size(
        before=usual(name, began - SETTLED_SECONDS, began),
        second=usual(name, began + quarter, began + 2 * quarter),
        last=usual(name, ended - quarter, ended),
        after=usual(name, settled - SETTLED_SECONDS, settled),
    )


def _rows_of(config: HostileBench, phase: Phase, seen: Seen) -> list[Row]:
    bound = max(usual_pauses(seen.phases)) + config.pause_seconds if phase.name == ATTACKED else None
    return [
        Row(phase.name, "longest pause", max(phase.pauses), "s", bound),
        Row(phase.name, "of that without a processor", seen.starvation.longest(*phase.worst), "s"),
        Row(phase.name, "longest wait for a text", max(phase.waits), "s"),
        Row(phase.name, "honest texts", phase.ended, "texts"),
        Row(phase.name, "changed texts", phase.changed, "texts", 0),
        Row(phase.name, "lost requests", len(phase.lost), "requests", 0),
        Row(phase.name, "honest tries after a refusal", phase.retries, "tries"),
    ]


def _answers(what: str, counts: Counter[str]) -> list[Row]:
    """By class: a row per status would fill pages."""
    classes: Counter[str] = Counter()
    for status, count in counts.items():
        classes[status if status in ("none", "503") else f"{status[0]}xx"] += count
    return [Row(what, f"answered {name}", count, "answers") for name, count in sorted(classes.items())]


def _faults(seen: Seen) -> dict[str, Any]:
    """And what began shortly before the longest pause, or in it."""
    suspects = seen.outcome.suspects(*seen.phases[ATTACKED].worst)
    return {"crashes": seen.crashes, "left": seen.left, "attack": seen.outcome.faults, "suspects": suspects}


def _answered(seen: Seen) -> dict[str, Goal]:
    answers = sum(seen.outcome.answers.values(), Counter())
    above = sum(count for status, count in answers.items() if status.isdigit() and is_fault(int(status)))
    silent = sum(not isinstance(fault["answer"], int) for fault in seen.outcome.faults)
    return {
        f"answers above 499 other than 503, of {answers.total()}": at_most(above, 0),
        "forged requests or connections that got no answer": at_most(silent, 0),
        "crashes": Goal(len(seen.crashes), "; ".join(["<= 0", *seen.crashes]), not seen.crashes),
        "requests and connections left": Goal(seen.left, "0", seen.left == 0),
    }


def _felt(config: HostileBench, seen: Seen) -> dict[str, Goal]:
    phases = seen.phases.values()
    return {
        "pause beyond both undisturbed phases, worst stream, s": at_most(excess(seen.phases), config.pause_seconds),
        f"changed texts, of {sum(phase.ended for phase in phases)}": at_most(sum(one.changed for one in phases), 0),
        "lost honest requests": at_most(sum(len(one.lost) for one in phases), 0),
    }


def _flat(config: HostileBench, sizes: dict[str, Size]) -> dict[str, Goal]:
    goals = {f"{name}: growth, MiB": at_most(size.growth, config.growth_mib) for name, size in sizes.items()}
    halves = {f"{name}: growth during the attack, MiB": at_most(s.leak, config.leak_mib) for name, s in sizes.items()}
    return goals | halves


SUITE = HostileBench, run
