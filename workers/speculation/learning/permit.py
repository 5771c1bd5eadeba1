"""Whether a trainer may begin its next micro-batch: all its ranks decide it together, between two micro-batches."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, process_time

import torch
import torch.distributed as dist

from stepladder.workers.speculation.learning.busy_word import Word
from stepladder.workers.speculation.learning.lease import UNDER_LOAD, Kind, Lease, LeaseNotice, Use
from stepladder.workers.speculation.learning.lease_trace import END, LEASE, LOAD, MICRO_BATCH, QUIET, LeaseTrace

LEAVE, STOP, GO = range(3)
Least = Callable[[int], int]


def least_over(group: dist.ProcessGroup) -> Least:
    """The smallest of all ranks' integers, on each of them: an all-reduce on the CPU (gloo)."""

    def least(value: int) -> int:
        ballot = torch.tensor([value])
        group.allreduce([ballot], dist.ReduceOp.MIN).wait()
        return int(ballot)

    return least


class Permit:
    """One rank's. `hear` and `use` are for any thread; the rest is for the thread that trains, which goes

        while not permit.over:
            if permit.go():
                with permit.micro_batch():
                    ...
            else:
                permit.wait(0.1)

    on all ranks alike: each call of `go` is a collective, so that none of them enters a micro-batch alone, and waits
    are short, so that none is long without the others.

    Args:
        least: agrees with the other ranks (`least_over`); a rank by itself needs none.
        word: what engines on this machine have to do.
        now, cpu: seconds, of this machine and of this process.

    Attributes:
        over: a rank has said that it leaves; all of them do.
    """

    def __init__(
        self,
        least: Least = lambda value: value,
        word: Callable[[], Word] = Word,
        trace: LeaseTrace | None = None,
        now: Callable[[], float] = monotonic,
        cpu: Callable[[], float] = process_time,
    ) -> None:
        self._least, self._word, self._now, self._cpu = least, word, now, cpu
        self.trace = trace or LeaseTrace()
        self.over = self._leaving = False
        self._change = threading.Condition()
        self._use, self._ends = Use(), 0.0
        self._lease: Lease | None = None
        self._load_since, self._loaded = 0.0, False

    def hear(self, notice: LeaseNotice) -> None:
        """A lease, a longer one, or none any more. Notices that were overtaken are not heeded."""
        with self._change:
            if notice.serial <= self._use.serial:
                return
            now, lease = self._now(), notice.lease
            self._expire(now)
            if self._lease and (lease is None or lease.number != self._lease.number):
                self._end(now)
            self._use = self._use._replace(serial=notice.serial)
            if lease and lease.number > self._use.number:
                self._use = Use(notice.serial, lease.number, at_work=self._use.at_work, wants=self._use.wants)
            if lease and not self._use.returned:
                if self._lease is None or self._lease.kind != lease.kind:
                    self.trace.add(LEASE, now, number=lease.number, kind=lease.kind)
                self._lease, self._ends = lease, now + lease.seconds
            self._change.notify_all()

    def use(self) -> Use:
        """For the controller."""
        with self._change:
            self._expire(self._now())
            return self._use

    def may(self) -> bool:
        """This rank's own opinion: a lease is in force that is not used up, and no engine here objects."""
        word = self._word()
        with self._change:
            now = self._now()
            self._note_load(word, now)
            self._expire(now)
            if (lease := self._lease) is None:
                return False
            return not (word.waiting if lease.kind == UNDER_LOAD else word.requests)

    def go(self) -> bool:
        """Whether all ranks may. A collective."""
        return self.vote(self.may())

    def vote(self, go: bool) -> bool:
        """Whether all ranks say so. A collective: every rank calls it as often as the others, never inside another."""
        agreed = self._least(LEAVE if self._leaving else GO if go else STOP)
        self.over = agreed == LEAVE
        return agreed == GO

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around each one that all ranks have agreed on."""
        began, cpu = self._now(), self._cpu()
        with self._change:
            self._use = self._use._replace(micro_batches=self._use.micro_batches + 1, at_work=True)
            kind = self._lease.kind if self._lease else None
        try:
            yield
        finally:
            word, ended = self._word(), self._now()
            with self._change:
                self._finish(began, ended, self._cpu() - cpu, kind)
                self._note_load(word, ended)

    def give_back(self) -> None:
        """There is nothing to learn from now; any rank, or each of them."""
        with self._change:
            self._use = self._use._replace(returned=True, wants=False)
            self._end(self._now())

    def want(self) -> None:
        """There is something to learn from again."""
        with self._change:
            self._use = self._use._replace(wants=True)

    def leave(self) -> None:
        """The next vote is the last one, for all ranks. From any thread."""
        with self._change:
            self._leaving = True
            self._change.notify_all()

    def wait(self, seconds: float) -> None:
        """Until there is news, at most so long."""
        with self._change:
            if not self._leaving:
                self._change.wait(seconds)

    def _finish(self, began: float, ended: float, core_seconds: float, kind: Kind | None) -> None:
        """The micro-batch counts under the lease that is known by now, which is another one only if that came in the
        middle of it; the controller gives none before it has heard that this rank has stopped."""
        use, lease, since = self._use, self._lease, self._ends
        self.trace.add(MICRO_BATCH, began, ended, use.number, kind)
        late = max(0.0, ended - max(began, since)) if lease is None or ended > since else 0.0
        self._use = use._replace(
            at_work=False,
            core_seconds=use.core_seconds + core_seconds,
            late_micro_batches=use.late_micro_batches + (late > 0),
            late_seconds=use.late_seconds + late,
        )
        self._expire(ended)
        if self._lease and self._use.micro_batches >= self._lease.micro_batches:
            self._use = self._use._replace(returned=True)
            self._end(ended)

    def _expire(self, now: float) -> None:
        if self._lease and now >= self._ends:
            self._end(self._ends)

    def _end(self, when: float) -> None:
        """The lease is not in force from then on."""
        if self._lease:
            self.trace.add(END, when, number=self._lease.number)
            self._lease, self._ends = None, when

    def _note_load(self, word: Word, now: float) -> None:
        if word.since > self._load_since:
            self._load_since, self._loaded = word.since, True
            self.trace.add(LOAD, word.since, number=self._use.number)
        if self._loaded and not word.requests:
            self._loaded = False
            self.trace.add(QUIET, now, number=self._use.number)
