"""What suite `failures` does to a deployment, with which options, and what it notes down."""

import shlex
import signal
from dataclasses import dataclass, field
from typing import NamedTuple

from stepladder.launch.typed_config import check_counts


class Fault(NamedTuple):
    """kind, rank: which process; of an "attention" failure, of which engine the only rank. signal: what it gets."""

    kind: str
    rank: int
    signal: signal.Signals

    @property
    def target(self) -> tuple[str, int]:
        """The group of the rank that is struck, and its place in it; not of a gateway or controller."""
        if self.kind == "attention":
            return f"engine-{self.rank}", 0
        return {"rank": "engine-0", "ffn": "ffn"}[self.kind], self.rank


FAULTS = {
    "SIGKILL rank 1": Fault("rank", 1, signal.SIGKILL),
    "SIGKILL rank 0": Fault("rank", 0, signal.SIGKILL),
    "SIGSTOP rank 1": Fault("rank", 1, signal.SIGSTOP),
    "SIGSTOP rank 0": Fault("rank", 0, signal.SIGSTOP),
    "SIGKILL gateway": Fault("gateway", 0, signal.SIGKILL),
    "SIGSTOP gateway": Fault("gateway", 0, signal.SIGSTOP),
    "SIGKILL controller": Fault("controller", 0, signal.SIGKILL),
    "SIGSTOP controller": Fault("controller", 0, signal.SIGSTOP),
    "SIGKILL F": Fault("ffn", 0, signal.SIGKILL),
    "SIGKILL F 1": Fault("ffn", 1, signal.SIGKILL),
    "SIGKILL A": Fault("attention", 1, signal.SIGKILL),
}
KINDS = {"tp": ("rank", "gateway", "controller"), "afd": ("ffn", "attention", "gateway", "controller")}
RANKS = {"tp": ("tp",), "afd": ("attention", "ffn")}  # the options that say how many ranks a kind has


@dataclass(frozen=True, kw_only=True)
class FailuresBench:
    """Options.

    Attributes:
        deploy: options of launch.serve, besides those below.
        kind: of layout, tp or afd. tp: ranks of the engine of "tp". attention, ffn: ranks of "afd".
        ray_cpus: processors that the private Ray believes in.
        ping_seconds, hang_seconds: of `cluster`; they bound how soon a failure can be noticed.
        failures: which of FAULTS, in turns; null takes all that the kind can suffer.
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
        if self.failures == []:
            raise ValueError("failures is empty, so nothing would be struck; name some, or give null for all")
        check_counts(self, "tp", "attention", "ffn", "repeats", "streams", "tokens")
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes:g}; it must be more than 0, or nothing would be struck")
        self._refuse_ranks_of_another_kind()

    def _refuse_ranks_of_another_kind(self) -> None:
        """They would be ignored, and the result taken for that of a layout that was not run."""
        for kind, names in RANKS.items():
            for name in names if kind != self.kind else ():
                if (value := getattr(self, name)) != getattr(FailuresBench, name):  # the default
                    remedy = f"omit it or use kind={kind}"
                    raise ValueError(f"{name} is {value}, but kind={self.kind} has no such ranks; {remedy}")

    @property
    def possible(self) -> list[str]:
        """The failures that this kind of layout can suffer."""
        ranks = {"rank": self.tp, "attention": self.attention, "ffn": self.ffn}
        kinds = KINDS[self.kind]
        return [name for name, one in FAULTS.items() if one.kind in kinds and one.rank < ranks.get(one.kind, 1)]

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
            f"cluster.ping_seconds={self.ping_seconds}",
            f"cluster.hang_seconds={self.hang_seconds}",
        ]

    def detection_bound(self, failure: Fault) -> float | None:
        """Seconds, by the configured timeouts; the time to look comes on top. Ray itself notices a dead controller."""
        if failure == FAULTS["SIGKILL controller"]:
            return None
        return self.ping_seconds + (self.hang_seconds if failure.signal == signal.SIGSTOP else 0.0)


@dataclass
class Occurrence:
    """What one strike did; times in seconds since it.

    Attributes:
        lost: requests that did not end with a whole text, or had to be sent twice though the gateway lived.
        changed: texts that are not the undisturbed one's, beginnings of broken streams included.
        detected: the controller noticed. ready: it said that all was well again.
        resumed, last_resumed: the first and the last of the streams that the failure made pause got text again; None
            if none paused longer than undisturbed streams do.
        ended: the last broken stream had ended. longest_pause: between two chunks of one stream.
        again: tokens that the engine, which lived on, generated twice.
        left: what is there and was not before.
        blocks: of the model, where the FFN pool that replaced a lost one went on, of each engine that was in a step.

    again, left and blocks are only looked for once the deployment is ready again.
    """

    lost: int
    changed: int
    detected: float | None
    ready: float | None
    resumed: float | None
    last_resumed: float | None
    ended: float | None
    longest_pause: float
    again: int | None = None
    left: dict[str, int] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
