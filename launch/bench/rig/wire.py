"""What a bench is told about a link: how narrow it is, or how late."""

from dataclasses import dataclass

from stepladder.launch.bench.rig.hosts import Link


@dataclass(frozen=True)
class Wire:
    """rate: Mbit/s of each host's link, None for as fast as the machine goes. late_ms: of latency, emulated. One of
    the two at most, so that a case is either measured or emulated."""

    rate: float | None = None
    late_ms: float = 0.0

    def __post_init__(self) -> None:
        Link(rate=self.rate)  # refuses a rate that no link can have, before anything is measured
        if self.late_ms < 0:
            raise ValueError(f"late_ms of a wire is {self.late_ms:g}; it must not be negative")
        if self.rate is not None and self.late_ms:
            both = f"rate {self.rate:g} and late_ms {self.late_ms:g}"
            raise ValueError(f"a wire has {both}; it can have one of them: make it two wires")
