"""What the controller and a trainer say to each other about the time in which training is allowed."""

from typing import Literal, NamedTuple

Kind = Literal["spare", "gaps", "load"]
SPARE: Kind = "spare"  # nothing serves on these machines
GAPS: Kind = "gaps"  # training goes on while no engine beside it has anything to do
UNDER_LOAD: Kind = "load"  # training goes on beside steps, in the windows that the throttle gives it


class Lease(NamedTuple):
    """Leave to train, for all ranks of a trainer group together.

    Attributes:
        number: above that of every earlier lease.
        ranks: of the group.
        deadline: on the controller's monotonic clock, in seconds. seconds: the same from the moment at which it was
            sent, for those whose clock is another.
        micro_batches: how many may be begun under this number in all; a renewal raises it.
        kind: what returning load means for it: under "spare" and "gaps", an engine beside it that has work is a veto;
            under "load", one in which requests wait for a place.
    """

    number: int
    group: str
    ranks: int
    deadline: float
    micro_batches: int
    kind: Kind = GAPS
    seconds: float = 0.0


class LeaseNotice(NamedTuple):
    """What a trainer is told: the lease that is in force from now on; None revokes what was.

    Attributes:
        serial: above that of every earlier notice; who hears an older one after a newer one does not heed it.
    """

    serial: int
    lease: Lease | None


class Use(NamedTuple):
    """What one of a trainer's ranks tells, with every sign of life.

    Attributes:
        serial: of the newest notice that it has heard.
        number: of the newest lease that it has heard of; the rest counts under this one. 0: none yet.
        micro_batches: begun. core_seconds: of this process meanwhile.
        late_micro_batches: that went on after the lease had ended here. late_seconds: how long.
        at_work: in a micro-batch now.
        returned: it has no more use for the lease, or has used it up.
        wants: it would train if it were allowed to.
    """

    serial: int = 0
    number: int = 0
    micro_batches: int = 0
    core_seconds: float = 0.0
    late_micro_batches: int = 0
    late_seconds: float = 0.0
    at_work: bool = False
    returned: bool = False
    wants: bool = True
