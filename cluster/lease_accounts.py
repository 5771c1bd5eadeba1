"""What has become of all leases, and what was done under them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stepladder.workers.speculation.learning.lease import Lease, Use


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """Every lease but the open one has ended in one of four ways.

    Attributes:
        revoked: load came back. expired: nobody renewed them, or their window was over. returned: by the trainer.
            lost: with the trainer.
        seconds: under a lease. micro_batches: begun by all ranks. core_seconds: of all ranks together.
        overrun_micro_batches, overrun_seconds: trained after a lease had ended: the one that was under way then, and
            any more, which there must not be.
    """

    granted: int = 0
    renewed: int = 0
    revoked: int = 0
    expired: int = 0
    returned: int = 0
    lost: int = 0
    seconds: float = 0.0
    micro_batches: int = 0
    core_seconds: float = 0.0
    overrun_micro_batches: int = 0
    overrun_seconds: float = 0.0

    @property
    def ended(self) -> int:
        return self.revoked + self.expired + self.returned + self.lost


@dataclass
class Record:
    """A lease and what its ranks have told of it.

    Attributes:
        ended: when; None while it is in force. serial: of the notice that ended it.
        told: by the ranks, at last. at_end: micro-batches that they had begun when they knew of its end.
    """

    lease: Lease
    granted: float
    ended: float | None = None
    serial: int = 0
    told: list[Use] = field(default_factory=list)
    at_end: int | None = None

    def hear(self, uses: Sequence[Use], too_late: bool) -> None:
        """too_late: the ranks must know of its end, whatever they have heard."""
        if not uses or any(use.number != self.lease.number for use in uses):
            return
        self.told = list(uses)
        if self.ended is not None and self.at_end is None and (too_late or all(u.serial >= self.serial for u in uses)):
            self.at_end = self.most

    @property
    def most(self) -> int:
        """Micro-batches that a rank has begun under it."""
        return max((use.micro_batches for use in self.told), default=0)

    def added_to(self, accounts: Accounts, now: float) -> Accounts:
        uses = self.told or [Use()]
        more = 0 if self.at_end is None else self.most - self.at_end
        late = max(more, *(use.late_micro_batches for use in uses))
        return replace(
            accounts,
            seconds=accounts.seconds + (now if self.ended is None else self.ended) - self.granted,
            micro_batches=accounts.micro_batches + min(use.micro_batches for use in uses),
            core_seconds=accounts.core_seconds + sum(use.core_seconds for use in uses),
            overrun_micro_batches=accounts.overrun_micro_batches + late,
            overrun_seconds=accounts.overrun_seconds + max(use.late_seconds for use in uses),
        )
