"""Suite `failures`: a deployment's processes are killed and stopped under load, and every client is asked what it saw.

Each occurrence strikes while `streams` requests (every other one greedy, the rest seeded) are under way. Every client
then must hold exactly the text of an undisturbed run, without having sent its request twice, unless it was the gateway
that was lost: then its stream ends, and a retry under the same X-Request-Id continues what runs on in the engine.
"""

import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median

from stepladder.launch.bench.failures.faults import FAULTS, FailuresBench, Occurrence
from stepladder.launch.report import Goal, Report, Row, at_most

ENDS_WITHIN = 1.0  # seconds, of the streams of a gateway that was killed
TITLES = {
    "detected": "detection",
    "ended": "streams end",
    "resumed": "first text again",
    "last_resumed": "last stream goes on",
    "ready": "ready again",
    "longest_pause": "longest pause",
}


def run(config: FailuresBench) -> Report:
    """Raises RuntimeError if the deployment does not come up; that it does not come back is a result."""
    # Ray reads these once, when it is imported; they must be the private Ray's
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    from stepladder.launch.bench.failures.deployment_under_test import deployed
    from stepladder.launch.bench.failures.rounds import Bench

    with deployed("failures", f"{config.run_dir}/serve", config.ray_cpus, config.options) as victim:
        bench = Bench(config, victim)
        bench.prepare()
        occurrences, ended = bench.rounds()
        remains = bench.stop()
    return report(config, bench.pause, occurrences, ended, remains, bench.unlike)


def report(
    config: FailuresBench,
    pause: float,
    occurrences: Mapping[str, Sequence[Occurrence]],
    ended: str | None,
    remains: Sequence[str],
    unlike: int = 0,
) -> Report:
    """What it all comes to.

    Args:
        pause: the longest of undisturbed streams, in seconds.
        ended: where and why the rounds ended before their time, None if they did not.
        remains: what `ray job stop` left.
        unlike: undisturbed texts that were not the same twice, so that nobody can tell what changes a text.
    """
    rows = [Row("undisturbed", "longest pause", pause, "s")]
    rows.append(Row("undisturbed", "changed texts", unlike, "requests", 0))
    rows += [row for name, seen in occurrences.items() for row in _rows(config, name, seen)]
    rows.append(Row("ray job stop", "left over", len(remains), "things", 0))
    details = {name: {str(nth): asdict(one) for nth, one in enumerate(seen)} for name, seen in occurrences.items()}
    summary = {"came back every time": _came_back(occurrences, ended)}
    summary["undisturbed: changed texts"] = at_most(unlike, 0)
    summary |= {line: goal for name, seen in occurrences.items() for line, goal in _summary(name, seen).items()}
    summary["ray job stop: left over"] = at_most(len(remains), 0)
    return Report("failures", rows, summary, details={"occurrences": details | {"ray job stop": {"left": remains}}})


def _rows(config: FailuresBench, name: str, seen: Sequence[Occurrence]) -> list[Row]:
    failure = FAULTS[name]
    if not seen:
        return [Row(name, "times struck", 0, "times")]
    rows = [
        Row(name, "lost requests", sum(one.lost for one in seen), "requests", 0),
        Row(name, "changed texts", sum(one.changed for one in seen), "requests", 0),
        Row(name, "left over", sum(abs(count) for one in seen for count in one.left.values()), "things", 0),
    ]
    bounds = {"detected": config.detection_bound(failure)}
    if failure.kind == "gateway":
        bounds["ended"] = ENDS_WITHIN if failure.signal == signal.SIGKILL else config.detection_bound(failure)
    for key, title in TITLES.items():
        times = [time for one in seen if (time := getattr(one, key)) is not None]
        for of, summarise in (("median", median), ("worst", max)):
            if times:
                rows.append(Row(name, f"{title}, {of}", summarise(times), "s", bounds.get(key)))
    if blocks := {block for one in seen for block in one.blocks}:
        rows.append(Row(name, "different blocks at which a step went on", len(blocks), "blocks"))
    if failure.kind in ("gateway", "controller", "ffn"):
        rows.append(Row(name, "tokens generated again", sum(one.again or 0 for one in seen), "tokens", 0))
    return rows


def _came_back(occurrences: Mapping[str, Sequence[Occurrence]], ended: str | None) -> Goal:
    times = [one.ready is not None for seen in occurrences.values() for one in seen]
    goal = f"all of {len(times)}"
    return Goal(sum(times), f"{goal}; {ended}" if ended else goal, ended is None and bool(times) and all(times))


def _summary(name: str, seen: Sequence[Occurrence]) -> dict[str, Goal]:
    failure = FAULTS[name]
    if not seen:
        return {f"{name}: times": Goal(0, ">= 1", False)}
    again = at_most(sum(abs(one.again or 0) for one in seen), 0)
    goals = {
        f"{name}: lost requests of {len(seen)} times": at_most(sum(one.lost for one in seen), 0),
        f"{name}: changed texts": at_most(sum(one.changed for one in seen), 0),
        f"{name}: left over": at_most(sum(bool(one.left) for one in seen), 0),
    }
    if failure == FAULTS["SIGKILL gateway"]:
        ended = [one.ended for one in seen if one.ended is not None]
        goals[f"{name}: streams end, worst"] = at_most(max(ended, default=None), ENDS_WITHIN)
        goals[f"{name}: tokens generated again"] = again
    if failure.kind in ("controller", "ffn"):
        goals[f"{name}: tokens generated again"] = again
    return goals


SUITE = FailuresBench, run
