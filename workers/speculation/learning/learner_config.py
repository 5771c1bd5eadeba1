"""How a head learns: the numbers of a learner, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepladder.workers.speculation.learning import objectives
from stepladder.workers.speculation.learning.replay import NEWEST
from stepladder.workers.training.sharded import STAGES

__all__ = ["LearnerConfig"]

RATE_BY_WIDTH = 0.25  # Adam's rate times the hidden size: 4.3e-4 at 576, 1e-3 at 256
COUNTS = (
    *("depth", "inner", "drafted", "batch", "accumulate", "steps", "every", "max_tokens", "newest"),
    *("judged", "judged_depth"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """objective: one of `OBJECTIVES`. rate: Adam's; by default it follows the width of the model, as Adam's does with
    maximal update parametrization (Yang et al. 2203.03466). average: what a candidate keeps of its weights at each step
    of the optimizer, so that it is a mean of the last 1 / (1 - average) or so (Polyak and Juditsky 1992); 0 takes the
    weights as they are. depth: tokens of a draft that are unrolled.

    inner: size of a new head's cell. drafted: tokens of the vocabulary that it drafts.

    batch: places of a micro-batch on each rank; accumulate: micro-batches of a step of the optimizer. steps: of it, for
    so many tokens that come to be learnt from:
    every: these tokens. zero_stage: of DeepSpeed. precision: fp32, or bf16 for autocast.

    max_tokens: of the replay, each 2 bytes times the hidden size; newest: those that half of every batch is from.
    errors_only: learn where drafting went wrong only. held_out: of so many requests one is judged by instead.

    judged: the newest so many held-out requests are what a candidate is judged by, judged_depth: with drafts of so many
    tokens, margin: and it must be better by more than so many accepted tokens per draft.

    seed: of the order in which is learnt, and of a new head's first weights.
    """

    objective: str = objectives.DEFAULT
    rate: float | None = None
    average: float = 0.95
    depth: int = 2
    inner: int = 512
    drafted: int = 4096
    batch: int = 128
    accumulate: int = 2
    steps: int = 10
    every: int = 640
    zero_stage: int = 1
    precision: str = "fp32"
    max_tokens: int = 1 << 17
    newest: int = NEWEST
    errors_only: bool = False
    held_out: int = 8
    judged: int = 32
    judged_depth: int = 4
    margin: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        objectives.named(self.objective)
        self.check_counts(COUNTS)
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"train.rate is {self.rate}; it must be above 0, or null")
        if not 0 <= self.average < 1:
            raise ValueError(f"train.average is {self.average}; it must be 0 or more, and below 1")
        if self.held_out < 2:
            raise ValueError(
                f"train.held_out is {self.held_out}; it must be 2 or more: of so many requests one is judged by"
            )
        if self.zero_stage not in STAGES:
            raise ValueError(f"train.zero_stage is {self.zero_stage}; it must be 1, 2 or 3")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"train.precision is {self.precision!r}; it must be fp32 or bf16")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"train.margin is {self.margin}; it must be 0 or more")

    def check_counts(self, names: Sequence[str]) -> None:
        """Raises ValueError if one of these is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 1 or more")

    def rate_of(self, hidden: int) -> float:
        """Adam's, for a model of that width."""
        return self.rate or RATE_BY_WIDTH / hidden
