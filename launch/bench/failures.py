"""Suite `failures`: a deployment's processes are killed and stopped under load, and every client is asked what it saw.

Each occurrence strikes while `streams` requests (every other one greedy, the rest seeded) are under way. Every client
then must hold exactly the text of an undisturbed run, without having sent its request twice, unless it was the gateway
that was lost: then its stream ends, and a retry under the same X-Request-Id continues what runs on in the engine.
"""

import shlex
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

from launch.bench.insist import Insisting
from launch.bench.report import Goal, Report, Row, at_most
from launch.bench.victim import Victim, Watch, deployed, within


class Failure(NamedTuple):
    """kind, rank: which process. signal: what it gets."""

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
}
ENDS_WITHIN = 1.0  # seconds, of the streams of a gateway that was killed


@dataclass(frozen=True, kw_only=True)
class FailuresBench:
    """Options.

    Attributes:
        deploy: options of launch.serve, besides those below.
        tp: ranks of the engine; ray_cpus: processors that the private Ray believes in.
        batch_invariant: without it a replay may round otherwise, and now and then a text goes on otherwise.
        ping_seconds, hang_seconds: of `cluster`; they bound how soon a failure can be noticed.
        failures: which of FAILURES, in this order. repeats: how often each.
        streams: requests under way at each. tokens: of each answer.
        recover_seconds: how long the deployment, and its clients, may take to come through one failure.
    """

    name: str
    run_dir: str
    deploy: str = "model=demo cluster=local"
    tp: int = 2
    ray_cpus: int = 4
    batch_invariant: bool = True
    ping_seconds: float = 0.5
    hang_seconds: float = 3.0
    failures: list[str] = field(default_factory=lambda: list(FAILURES))
    repeats: int = 10
    streams: int = 16
    tokens: int = 200
    recover_seconds: float = 90.0

    def __post_init__(self) -> None:
        if unknown := set(self.failures) - set(FAILURES):
            raise ValueError(f"failures holds {unknown.pop()!r}; it may hold {', '.join(FAILURES)}")
        for name in ("tp", "repeats", "streams", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if any(FAILURES[name].rank >= self.tp for name in self.failures):
            raise ValueError(f"failures strikes a rank that tp={self.tp} does not have; leave it out")

    @property
    def options(self) -> list[str]:
        return [
            *shlex.split(self.deploy),
            f"engine.batch_invariant={str(self.batch_invariant).lower()}",
            f"cluster.ping_seconds={self.ping_seconds}",
            f"cluster.hang_seconds={self.hang_seconds}",
        ]

    def detection_bound(self, failure: Failure) -> float:
        """Seconds, by the configured timeouts; the time to look comes on top."""
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


def run(config: FailuresBench) -> Report:
    """Raises RuntimeError if the deployment does not come up, or does not come back."""
    with deployed("failures", f"{config.run_dir}/serve", config.tp, config.ray_cpus, config.options) as victim:
        bench = Bench(config, victim)
        bench.prepare()
        occurrences = {name: [bench.strike(name, nth) for nth in range(config.repeats)] for name in config.failures}
        remains = bench.stop()
    rows = [Row("undisturbed", "longest pause", bench.pause, "s")]
    rows += [row for name, seen in occurrences.items() for row in _rows(config, name, seen)]
    rows.append(Row("ray job stop", "left over", len(remains), "things", 0))
    details = {name: {str(nth): asdict(one) for nth, one in enumerate(seen)} for name, seen in occurrences.items()}
    summary = {line: goal for name, seen in occurrences.items() for line, goal in _summary(name, seen).items()}
    summary["ray job stop: left over"] = at_most(len(remains), 0)
    return Report("failures", rows, summary, details={"occurrences": details | {"ray job stop": {"left": remains}}})


class Bench:
    """One deployment, struck again and again."""

    def __init__(self, config: FailuresBench, victim: Victim) -> None:
        self._config, self._victim = config, victim
        self._texts: list[str] = []
        self._census: dict[str, int] = {}
        self.pause = 0.0

    def prepare(self) -> None:
        """The undisturbed texts.

        Raises:
            RuntimeError: they cannot be had, or are not the same twice though the engine is to be batch invariant.
        """
        runs = [self._under_way("undisturbed", nth, lambda _: None) for nth in range(2)]
        first, second = [[client.text for client in clients] for clients in runs]
        if failure := next((client.failure for clients in runs for client in clients if client.failure), None):
            raise RuntimeError(f"an undisturbed request failed: {failure}")
        if self._config.batch_invariant and first != second:
            raise RuntimeError("two undisturbed runs gave different texts though engine.batch_invariant=true")
        self._texts, self._census = first, self._victim.census()
        self.pause = max(client.longest_pause for client in runs[1])

    def strike(self, name: str, nth: int) -> Occurrence:
        """One occurrence of a failure; returns when the deployment is whole again.

        Raises:
            RuntimeError: it does not become so.
        """
        failure, config, victim = FAILURES[name], self._config, self._victim
        process, generated = victim.process(failure.kind, failure.rank), victim.engine()["generation_tokens"]
        struck: list[tuple[float, Watch]] = []

        def hit(_: Sequence[Insisting]) -> None:
            watch = Watch(victim, victim.status(), config.recover_seconds)
            process.send_signal(failure.signal)
            struck.append((monotonic(), watch))

        clients = self._under_way(name, nth, hit)
        (moment, watch) = struck[0]
        watch.join()
        if watch.ready is None:
            raise RuntimeError(f"{name}: not ready again after {config.recover_seconds:.0f} s ({victim.status()})")
        whole = within(10.0, lambda: victim.census() == self._census and not self._busy())
        again = None
        if failure.kind != "rank":
            again = victim.engine()["generation_tokens"] - generated - config.streams * config.tokens
        left = {} if whole else {**_excess(victim.census(), self._census), "requests in the engine": self._busy()}
        seen = _judge(failure, clients, self._texts, moment, watch, again, left)
        print(f"{name} {nth + 1}/{config.repeats}: {seen}", flush=True)
        return seen

    def stop(self) -> list[str]:
        """`ray job stop`; what is left a while after it."""
        self._victim.cluster.job("stop", self._victim.name)
        within(60.0, lambda: not self._victim.remains())
        return self._victim.remains()

    def _busy(self) -> int:
        counters = self._victim.engine()
        return counters["running"] + counters["waiting"]

    def _under_way(self, name: str, nth: int, hit: Callable[[Sequence[Insisting]], None]) -> list[Insisting]:
        """All clients to their end; `hit` when every one has got text, and the first of them as much as is this
        occurrence's turn."""
        config = self._config
        clients = [self._client(f"{name.replace(' ', '-')}-{nth}-{index}", index) for index in range(config.streams)]
        begun = config.tokens // 20 + nth * config.tokens // 2 // config.repeats
        with ThreadPoolExecutor(config.streams) as pool:
            futures: list[Future[Insisting]] = [pool.submit(client.run) for client in clients]
            if within(config.recover_seconds, lambda: all(c.arrivals for c in clients) and _begun(clients[0], begun)):
                hit(clients)
            return [future.result() for future in futures]

    def _client(self, request_id: str, index: int) -> Insisting:
        body: dict[str, Any] = {"model": "demo", "prompt": f"class Stack{index}:\n    def __init__(self, {'x' * index}"}
        body |= {"max_tokens": self._config.tokens, "ignore_eos": True, "seed": index}
        body["temperature"] = 0.0 if index % 2 else 0.8
        return Insisting(self._victim.url, request_id, body, self._config.recover_seconds)


def _begun(client: Insisting, chunks: int) -> bool:
    return len(client.arrivals) >= chunks


def _judge(
    failure: Failure,
    clients: Sequence[Insisting],
    texts: Sequence[str],
    moment: float,
    watch: Watch,
    again: int | None,
    left: dict[str, int],
) -> Occurrence:
    hits_streams = failure.kind == "gateway"
    pairs = list(zip(clients, texts, strict=True))
    changed = sum(
        client.text != text or not all(text.startswith(broken) for _, broken in client.broken)
        for client, text in pairs
        if not client.failure
    )
    breaks = [time - moment for client in clients for time, _ in client.broken]
    cut = moment + max(breaks) if hits_streams and breaks else (watch.noticed or moment)
    later = [time - moment for client in clients for time in client.arrivals if time > cut]
    return Occurrence(
        lost=sum(bool(client.failure) or bool(client.retries and not hits_streams) for client in clients),
        changed=changed,
        detected=watch.noticed - moment if watch.noticed else None,
        ready=watch.ready - moment if watch.ready else None,
        resumed=min(later, default=None) if failure.kind != "controller" else None,
        ended=max(breaks, default=None) if hits_streams else None,
        again=again,
        longest_pause=max(client.longest_pause for client in clients),
        left=left,
    )


def _excess(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {kind: now[kind] - count for kind, count in before.items() if now[kind] != count}


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
    if failure.kind != "rank":
        rows.append(Row(name, "tokens generated again", sum(one.again or 0 for one in seen), "tokens", 0))
    return rows


def _summary(name: str, seen: Sequence[Occurrence]) -> dict[str, Goal]:
    failure = FAILURES[name]
    goals = {
        f"{name}: lost requests of {len(seen)} times": at_most(sum(one.lost for one in seen), 0),
        f"{name}: changed texts": at_most(sum(one.changed for one in seen), 0),
        f"{name}: left over": at_most(sum(bool(one.left) for one in seen), 0),
    }
    if failure == FAILURES["SIGKILL gateway"]:
        ended = [one.ended for one in seen if one.ended is not None]
        goals[f"{name}: streams end, worst"] = at_most(max(ended, default=None), ENDS_WITHIN)
        goals[f"{name}: tokens generated again"] = at_most(sum(one.again or 0 for one in seen), 0)
    if failure.kind == "controller":
        goals[f"{name}: tokens generated again"] = at_most(sum(one.again or 0 for one in seen), 0)
    return goals
