"""Leases on capacity that nobody wants: the controller gives a trainer leave to train, and takes it back.

Pure code: time is an argument, and so is what the controller has anyway. `look` is called about every ping.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite

from stepladder.cluster.idleness import Idleness, Load, Reading
from stepladder.cluster.lease_accounts import Accounts, Record
from stepladder.cluster.throttle import Throttle
from stepladder.workers.speculation.learning.lease import GAPS, SPARE, UNDER_LOAD, Kind, Lease, LeaseNotice, Use

COMPUTE_SECONDS = 60.0  # that training's share of compute is told of
QUIET = 0.95  # idle share from which on there is no load that training could cost anything
FIRST = 2  # windows of first cycles in gaps: all that training can cost there is the wait of a request that returns


@dataclass(frozen=True, kw_only=True)
class LeaseRules:
    """When there is a lease, and for how long.

    Attributes:
        seconds: until its deadline. A lease is renewed at half of that, so that a trainer which has lost its controller
            stops by itself.
        micro_batches: until it has to be renewed.
        look_back: seconds over which ranks must have been idle.
        idle_above: the idle share of engines that makes room for a lease in their gaps. busy_below: the one under which
            it is under load, and the throttle alone says when.
    """

    seconds: float = 5.0
    micro_batches: int = 256
    look_back: float = 3.0
    idle_above: float = 0.5
    busy_below: float = 0.3

    def __post_init__(self) -> None:
        assert 0 <= self.busy_below <= self.idle_above <= QUIET and self.seconds > 0 and self.micro_batches > 0


class Ledger:
    """Of one trainer group, whose ranks have at most one lease, all together.

    Args:
        group: the trainer's name. ranks: how many it has.
        max_loss: see `Throttle`; what training costs in gaps and what it costs under load are two things.
        first: the number of the first notice, above all that earlier lives of the controller gave.

    Attributes:
        notice: what the trainer is to be told now.
        loads: by group.
        throttles: for leases in gaps, and for those under load.
    """

    def __init__(
        self, group: str, ranks: int, rules: LeaseRules | None = None, max_loss: float = 0.05, first: int = 1
    ) -> None:
        self._group, self._ranks, self._rules = group, ranks, rules or LeaseRules()
        self.throttles = {GAPS: Throttle(max_loss, FIRST), UNDER_LOAD: Throttle(max_loss)}
        self.notice = LeaseNotice(first, None)
        self.loads: dict[str, Load] = {}
        self._idleness: dict[str, Idleness] = {}
        self._record: Record | None = None  # of the newest lease
        self._before = Accounts()  # of those before
        self._now = -inf
        self._steps = self._step_seconds = self._served = 0.0
        self._compute: deque[tuple[float, float, float]] = deque()  # when, core-seconds of training, of serving

    @property
    def lease(self) -> Lease | None:
        """The one that is in force."""
        return self.notice.lease

    @property
    def accounts(self) -> Accounts:
        """As of the last look."""
        return self._record.added_to(self._before, self._now) if self._record else self._before

    @property
    def compute_share(self) -> float:
        """Of the core-seconds that serving and training had together in the last minute, training's."""
        if not self._compute:
            return 0.0
        (_, trained, served), (_, trained_now, served_now) = self._compute[0], self._compute[-1]
        total = trained_now - trained + served_now - served
        return (trained_now - trained) / total if total else 0.0

    def figures(self) -> dict[str, float]:
        """For whoever watches over time; bounds of the effect once it has been measured."""
        found = {f"lease_{name}": float(value) for name, value in asdict(self.accounts).items()}
        found |= {"lease_open": float(self.lease is not None), "compute_share": self.compute_share}
        for kind, throttle in self.throttles.items():
            effect = throttle.effect
            found |= {f"{kind}_window_share": throttle.share, f"{kind}_tpot_cost": throttle.cost}
            if isfinite(effect.high):
                known = {"loss": effect.loss, "loss_low": effect.low, "loss_high": effect.high}
                found |= {f"{kind}_tpot_{name}": value for name, value in known.items()}
        return found

    def look(self, now: float, groups: Mapping[str, Reading], uses: Sequence[Use]) -> LeaseNotice:
        """Decide.

        Args:
            groups: all but the trainer's own. uses: what the trainer's ranks have told; none while it starts or has
                been lost.
        """
        assert now >= self._now and len(uses) in (0, self._ranks)
        self._now = now
        self._read(groups)
        self._hear(uses)
        self._count_compute()
        kind = self._kind(groups)
        if lease := self.lease:
            if kind is None:
                self._end("revoked")
            elif kind != lease.kind or self._due(lease):
                self._renew(lease, kind)
        elif kind and self._free(uses):
            self._grant(kind)
        return self.notice

    def _read(self, groups: Mapping[str, Reading]) -> None:
        for name in set(self._idleness) - set(groups):
            del self._idleness[name]
        for name, reading in groups.items():
            idleness = self._idleness.setdefault(name, Idleness(self._rules.look_back))
            idleness.feed(self._now, reading)
            self._served += idleness.core_seconds
            if reading.serves and reading.beside:
                self._steps += idleness.steps
                self._step_seconds += idleness.step_seconds
        self.loads = {
            name: Load(self._idleness[name].share, one.running, one.waiting, one.serves) for name, one in groups.items()
        }

    def _hear(self, uses: Sequence[Use]) -> None:
        """What the trainer says of its lease, and what its deadline does."""
        if not (record := self._record):
            return
        over = record.ended is not None and self._now > record.ended + self._rules.seconds
        record.hear(uses, too_late=over)
        if not (lease := self.lease):
            return
        if not uses or any(use.number > lease.number for use in uses):
            self._end("lost")
        elif any(use.returned and use.number == lease.number for use in uses):
            self._end("returned")
        elif self._now >= lease.deadline:
            self._end("expired", lease.deadline)

    def _count_compute(self) -> None:
        self._compute.append((self._now, self.accounts.core_seconds, self._served))
        while len(self._compute) > 2 and self._compute[1][0] <= self._now - COMPUTE_SECONDS:
            self._compute.popleft()

    def _kind(self, groups: Mapping[str, Reading]) -> Kind | None:
        """What a lease could be had for now."""
        beside = [self.loads[name] for name, one in groups.items() if one.serves and one.beside]
        shares = [load.idle for load in beside if load.idle is not None]
        waiting, running = any(load.waiting for load in beside), any(load.running for load in beside)
        starting = len(shares) < len(beside)  # or lost: its machine is for getting it back
        least = min(shares, default=1.0)
        if not beside or starting or (least >= QUIET and not waiting and not running):
            self._throttle(None)
            return None if starting else GAPS if beside else SPARE
        bound = self._rules.busy_below if self.lease and self.lease.kind == GAPS else self._rules.idle_above
        kind = GAPS if least >= bound else UNDER_LOAD
        return kind if self._throttle(kind) and not waiting else None

    def _throttle(self, kind: Kind | None) -> bool:
        """Whether the one of this kind lets there be a lease now; what the others have begun to measure ends."""
        for other, throttle in self.throttles.items():
            if other != kind:
                throttle.pause()
        if kind is None:
            return False
        self.throttles[kind].feed(self._now, self._steps, self._step_seconds, self.accounts.micro_batches)
        return self.throttles[kind].allowed

    def _free(self, uses: Sequence[Use]) -> bool:
        """Whether all ranks wait for a lease: none is in a micro-batch, and none believes that an older one holds."""
        heard = all(use.serial >= self.notice.serial or not use.serial for use in uses)
        return bool(uses) and heard and all(use.wants and not use.at_work for use in uses)

    def _due(self, lease: Lease) -> bool:
        left = lease.micro_batches - (self._record.most if self._record else 0)
        return lease.deadline - self._now <= self._rules.seconds / 2 or left <= self._rules.micro_batches / 2

    def _grant(self, kind: Kind) -> None:
        self._before = replace(self.accounts, granted=self._before.granted + 1)
        lease = Lease(self.notice.serial + 1, self._group, self._ranks, 0.0, self._rules.micro_batches, kind)
        self._record = Record(lease, self._now)
        self._tell(self._until(lease))

    def _renew(self, lease: Lease, kind: Kind) -> None:
        """For longer, if the throttle's window does not end it anyway."""
        assert self._record
        most = max(lease.micro_batches, self._record.most + self._rules.micro_batches)
        renewed = self._until(lease._replace(kind=kind, micro_batches=most))
        if renewed != lease._replace(seconds=renewed.seconds):
            self._before = replace(self._before, renewed=self._before.renewed + 1)
            self._tell(renewed)

    def _until(self, lease: Lease) -> Lease:
        deadline = self._now + self._rules.seconds
        for throttle in self.throttles.values():
            if throttle.allowed:
                deadline = min(deadline, throttle.until)
        return lease._replace(deadline=deadline, seconds=deadline - self._now)

    def _tell(self, lease: Lease | None) -> None:
        self.notice = LeaseNotice(self.notice.serial + 1, lease)

    def _end(self, how: str, when: float | None = None) -> None:
        """In one of the ways that `Accounts` knows."""
        assert self._record and self._record.ended is None
        self._tell(None)
        self._record.ended, self._record.serial = self._now if when is None else when, self.notice.serial
        self._before = replace(self._before, **{how: getattr(self._before, how) + 1})
