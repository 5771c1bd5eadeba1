"""Suite `failures`: a deployment's processes are killed and stopped under load, and every client is asked what it saw.

Each occurrence strikes while `streams` requests (every other one greedy, the rest seeded) are under way. Every client
then must hold exactly the text of an undisturbed run, without having sent its request twice, unless it was the gateway
that was lost: then its stream ends, and a retry under the same X-Request-Id continues what runs on in the engine.
"""

import os
import secrets
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import NamedTuple

from launch.bench.report import Goal, Report, Row, at_most


class Failure(NamedTuple):
    """kind, rank: which process; of an "attention" failure, of which engine the only rank. signal: what it gets."""

    kind: str
    rank: int
    signal: signal.Signals


FAILURES = {
    "SIGKILL rank 1": Failure("rank", 1, signal.SIGKILL),
    "SIGKILL rank 0": Failure("rank", 0, signal.SIGKILL),
    "SIGSTOP rank 1": Failure("rank", 1, signal.SIGSTOP),
    "SIGSTOP rank 0": Failure("rank", 0, signal.SIGSTOP),
    "SIGKILL gateway": Failure("gateway", 0, signal.SIGKILL),
    "SIGSTOP gateway": Failure("gateway", 0, signal.SIGSTOP),
    "SIGKILL controller": Failure("controller", 0, signal.SIGKILL),
    "SIGSTOP controller": Failure("controller", 0, signal.SIGSTOP),
    "SIGKILL F": Failure("ffn", 0, signal.SIGKILL),
    "SIGKILL A": Failure("attention", 1, signal.SIGKILL),
}
KINDS = {"tp": ("rank", "gateway", "controller"), "afd": ("ffn", "attention", "gateway", "controller")}
ENDS_WITHIN = 1.0  # seconds, of the streams of a gateway that was killed


@dataclass(frozen=True, kw_only=True)
class FailuresBench:
    """Options.

    Attributes:
        deploy: options of launch.serve, besides those below.
        kind: of layout, tp or afd. tp: ranks of the engine of "tp". attention, ffn: ranks of "afd".
        ray_cpus: processors that the private Ray believes in.
        batch_invariant: without it a replay may round otherwise, and now and then a text goes on otherwise.
        ping_seconds, hang_seconds: of `cluster`; they bound how soon a failure can be noticed.
        failures: which of FAILURES, in turns; null takes all that the kind can suffer.
        repeats: how often each; minutes: after which no more are begun.
        streams: requests under way at each. tokens: of each answer.
        recover_seconds: how long the deployment, and its clients, may take to come through one failure.
    """

    name: str
    run_dir: str
    deploy: str = "model=demo cluster=local"
    kind: str = "tp"
    tp: int = 2
    attention: int = 2
    ffn: int = 1
    ray_cpus: int = 4
    batch_invariant: bool = True
    ping_seconds: float = 0.5
    hang_seconds: float = 3.0
    failures: list[str] | None = None
    repeats: int = 10
    minutes: float = 60.0
    streams: int = 16
    tokens: int = 200
    recover_seconds: float = 90.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if unknown := set(self.failures or ()) - set(self.possible):
            raise ValueError(f"failures holds {unknown.pop()!r}; it may hold {', '.join(self.possible)}")
        for name in ("tp", "attention", "ffn", "repeats", "streams", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def possible(self) -> list[str]:
        """The failures that this kind of layout can suffer."""
        ranks = {"rank": self.tp, "attention": self.attention}
        kinds = KINDS[self.kind]
        return [name for name, one in FAILURES.items() if one.kind in kinds and one.rank < ranks.get(one.kind, 1)]

    @property
    def chosen(self) -> list[str]:
        return self.possible if self.failures is None else self.failures

    @property
    def ranks(self) -> list[str]:
        """The layout, as options of launch.serve."""
        if self.kind == "tp":
            return [f"layout.tp={self.tp}"]
        return ["layout=afd", f"layout.attention={self.attention}", f"layout.ffn={self.ffn}"]

    @property
    def options(self) -> list[str]:
        return [
            *shlex.split(self.deploy),
            *self.ranks,
            f"engine.batch_invariant={str(self.batch_invariant).lower()}",
            f"cluster.ping_seconds={self.ping_seconds}",
            f"cluster.hang_seconds={self.hang_seconds}",
        ]

    def detection_bound(self, failure: Failure) -> float | None:
        """Seconds, by the configured timeouts; the time to look comes on top. Ray itself notices a dead controller."""
        if failure == FAILURES["SIGKILL controller"]:
            return None
        return self.ping_seconds + (self.hang_seconds if failure.signal == signal.SIGSTOP else 0.0)


@dataclass
class Occurrence:
    """What one strike did; times in seconds since it.

    Attributes:
        lost: requests that did not end with a whole text, or had to be sent twice though the gateway lived.
        changed: texts that are not the undisturbed one's, beginnings of broken streams included.
        detected: the controller noticed. ready: it said that all was well again.
        resumed: a client got text again, after a pause that the failure caused.
        ended: the last broken stream had ended. again: tokens that the engine, which lived on, generated twice.
        longest_pause: between two chunks of one stream. left: what is there and was not before.
        block: of the model, where the FFN pool that replaced a lost one went on.
    """

    lost: int
    changed: int
    detected: float | None
    ready: float | None
    resumed: float | None
    ended: float | None
    again: int | None
    longest_pause: float
    left: dict[str, int]
    block: int | None = None


def run(config: FailuresBench) -> Report:
    """Raises RuntimeError if the deployment does not come up, or does not come back."""
    # Ray reads these once, when it is imported; they must be the private Ray's
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    from launch.bench.strikes import Bench, deployed

    with deployed("failures", f"{config.run_dir}/serve", config.ray_cpus, config.options) as victim:
        bench = Bench(config, victim)
        bench.prepare()
        occurrences = bench.rounds()
        remains = bench.stop()
    rows = [Row("undisturbed", "longest pause", bench.pause, "s")]
    rows += [row for name, seen in occurrences.items() for row in _rows(config, name, seen)]
    rows.append(Row("ray job stop", "left over", len(remains), "things", 0))
    details = {name: {str(nth): asdict(one) for nth, one in enumerate(seen)} for name, seen in occurrences.items()}
    summary = {line: goal for name, seen in occurrences.items() for line, goal in _summary(name, seen).items()}
    summary["ray job stop: left over"] = at_most(len(remains), 0)
    return Report("failures", rows, summary, details={"occurrences": details | {"ray job stop": {"left": remains}}})


def _rows(config: FailuresBench, name: str, seen: Sequence[Occurrence]) -> list[Row]:
    failure = FAILURES[name]
    rows = [
        Row(name, "lost requests", sum(one.lost for one in seen), "requests", 0),
        Row(name, "changed texts", sum(one.changed for one in seen), "requests", 0),
        Row(name, "left over", sum(abs(count) for one in seen for count in one.left.values()), "things", 0),
    ]
    bounds = {"detected": config.detection_bound(failure)}
    if failure.kind == "gateway":
        bounds["ended"] = ENDS_WITHIN if failure.signal == signal.SIGKILL else config.detection_bound(failure)
    titles = {"detected": "detection", "ended": "streams end", "resumed": "first text again", "ready": "ready again"}
    for key, title in {**titles, "longest_pause": "longest pause"}.items():
        times = [time for one in seen if (time := getattr(one, key)) is not None]
        for of, summarise in (("median", median), ("worst", max)):
            if times:
                rows.append(Row(name, f"{title}, {of}", summarise(times), "s", bounds.get(key)))
    if blocks := {one.block for one in seen if one.block is not None}:
        rows.append(Row(name, "different blocks at which a step went on", len(blocks), "blocks"))
    if failure.kind in ("gateway", "controller", "ffn"):
        rows.append(Row(name, "tokens generated again", sum(one.again or 0 for one in seen), "tokens", 0))
    return rows


def _summary(name: str, seen: Sequence[Occurrence]) -> dict[str, Goal]:
    failure = FAILURES[name]
    if not seen:
        return {f"{name}: times": Goal(0, ">= 1", False)}
    again = at_most(sum(abs(one.again or 0) for one in seen), 0)
    goals = {
        f"{name}: lost requests of {len(seen)} times": at_most(sum(one.lost for one in seen), 0),
        f"{name}: changed texts": at_most(sum(one.changed for one in seen), 0),
        f"{name}: left over": at_most(sum(bool(one.left) for one in seen), 0),
    }
    if failure == FAILURES["SIGKILL gateway"]:
        ended = [one.ended for one in seen if one.ended is not None]
        goals[f"{name}: streams end, worst"] = at_most(max(ended, default=None), ENDS_WITHIN)
        goals[f"{name}: tokens generated again"] = again
    if failure.kind in ("controller", "ffn"):
        goals[f"{name}: tokens generated again"] = again
    return goals
