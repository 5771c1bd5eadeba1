"""Options of suite `hostile`."""

import shlex
from dataclasses import dataclass

from stepladder.launch.typed_config import check_counts


@dataclass(frozen=True, kw_only=True)
class HostileBench:
    """Options.

    Attributes:
        deploy: options of launch.serve.
        ray_cpus: processors that the private Ray believes in.
        seed: of the attack. seconds: how long it goes on. requests: it ends sooner once so many were forged.
        clients: forged requests under way at once. intruders: connections that misbehave at once.
        streams: honest requests under way at any time. tokens: of each answer.
        quiet_seconds: of each of the two phases without an attack.
        answer_seconds: that a forged request may take, and an honest one. A forged one that takes longer is sent once
            more when the attack is over.
        settle_seconds: after which nothing of the attack may be under way any longer.
        pause_seconds: that a stream may pause longer than in both quiet phases.
        growth_mib: of each process by the attack, what it uses for the first time included (the KV cache's memory, the
            largest batch, the largest answer). leak_mib: from the attack's second quarter to its last.
    """

    name: str
    run_dir: str
    deploy: str = "model=demo cluster=local layout.tp=1"
    ray_cpus: int = 4
    seed: int = 0
    seconds: float = 180.0
    requests: int | None = None
    clients: int = 8
    intruders: int = 24
    streams: int = 8
    tokens: int = 200
    quiet_seconds: float = 20.0
    answer_seconds: float = 60.0
    settle_seconds: float = 90.0
    pause_seconds: float = 1.0
    growth_mib: float = 512.0
    leak_mib: float = 64.0

    def __post_init__(self) -> None:
        check_counts(self, "requests", "clients", "intruders", "streams", "tokens")
        for name in ("seconds", "quiet_seconds", "answer_seconds", "settle_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be more than 0")

    @property
    def options(self) -> list[str]:
        """Of launch.serve."""
        return shlex.split(self.deploy)
