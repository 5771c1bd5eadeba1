"""Options of suite=learning."""

import shlex
from dataclasses import dataclass, field

from stepladder.launch.recipes.library_traffic import KINDS
from stepladder.launch.typed_config import check_counts


@dataclass(frozen=True, kw_only=True)
class LearningBench:
    """Options.

    Attributes:
        deploy: options of launch.serve; the drafter must learn.
        ray_cpus: processors that the private Ray believes in.
        blocks: a multiple of 4; training is allowed, not allowed, not allowed, allowed, and so on.
        seconds: of a block. guard: of each, seconds at its beginning in which there is load that does not count: what
            was ordered has to arrive first.
        warm: seconds of load before, with training.
        streams: requests that come at once. tokens: of each answer. kind: of text: source, prose, tables.
        lulls: shortest and longest pause between two such bursts, in seconds.
        temperature: of sampling; every request has a seed of its own.
        seed: of the traffic and its lulls.
    """

    name: str
    run_dir: str
    deploy: str = "model=demo cluster=local speculate=hybrid train=online"
    ray_cpus: int = 4
    blocks: int = 24
    seconds: float = 10.0
    guard: float = 2.0
    warm: float = 30.0
    streams: int = 4
    tokens: int = 64
    kind: str = "tables"
    lulls: list[float] = field(default_factory=lambda: [0.2, 2.0])
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "ray_cpus", "blocks", "streams")
        if self.blocks % 4:
            raise ValueError(f"blocks is {self.blocks}; it must be a multiple of 4, so that none has the better places")
        if self.tokens < 2:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 2, the first one is timed apart")
        if not 0 <= self.guard < self.seconds:
            raise ValueError(f"guard is {self.guard:g}; it must be at least 0 and below seconds, {self.seconds:g}")
        if self.warm < 0 or self.temperature < 0:
            raise ValueError("warm and temperature must be at least 0")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if len(self.lulls) != 2 or not 0 <= self.lulls[0] <= self.lulls[1]:
            raise ValueError(f"lulls is {self.lulls}; it must be the shortest and the longest, in seconds")

    @property
    def options(self) -> list[str]:
        return shlex.split(self.deploy)

    def allowed(self, block: int) -> bool:
        """Whether there is training in it. Neighbours 0 and 1, 2 and 3 differ; 1 and 2, 3 and 4 are of one kind."""
        return block % 4 in (0, 3)
