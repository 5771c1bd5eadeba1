"""Options of a drafter that is taught while its model serves."""

from dataclasses import dataclass

from stepladder.workers.speculation.learning.learner_config import LearnerConfig

__all__ = ["LearnConfig"]

OFF, ONLINE = "off", "online"


@dataclass(frozen=True, kw_only=True)
class LearnConfig(LearnerConfig):
    """The rest is how a head learns: `LearnerConfig`.

    Attributes:
        kind: `online` teaches the head of `speculate` (head or hybrid) from what is answered; or `off`.
        ranks: that train together, processes that serving does not need. threads: of each, on a CPU.
        ring_mb: what an engine keeps of its answers until a trainer asks for it, in MiB; then the oldest goes.
        candidate_every: steps of the optimizer after which what was learnt is judged, and made live if it is better. At
            first it is judged sooner, when most is learnt: after 2 steps, then after 4, 8, ... more, until it is these.
        keep: versions that stay on the disk, under run_dir/drafter, beside those in use.
        max_tpot_loss: the share of an engine's speed under load that training may cost; it gives way to keep that.
    """

    kind: str = OFF
    ranks: int = 1
    threads: int = 1
    ring_mb: float = 64.0
    candidate_every: int = 40
    keep: int = 5
    max_tpot_loss: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in (OFF, ONLINE):
            raise ValueError(f"train.kind is {self.kind!r}; it must be {OFF} or {ONLINE}")
        self.check_counts(("ranks", "threads", "candidate_every", "keep"))
        if not self.ring_mb > 0:
            raise ValueError(f"train.ring_mb is {self.ring_mb}; it must be above 0")
        if not 0 < self.max_tpot_loss < 1:
            raise ValueError(f"train.max_tpot_loss is {self.max_tpot_loss}; it is a share, above 0 and below 1")

    @property
    def is_on(self) -> bool:
        return self.kind == ONLINE
