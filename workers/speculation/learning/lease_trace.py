"""What happened around a lease and when, so that how long returning load waits can be read from it."""

import threading
from collections import deque
from collections.abc import Iterable
from math import inf
from typing import Any, Literal, NamedTuple

What = Literal["micro_batch", "lease", "end", "load", "quiet"]
MICRO_BATCH: What = "micro_batch"
LEASE: What = "lease"  # was heard of
END: What = "end"  # of the lease: revoked, past its deadline, given back
LOAD: What = "load"  # an engine beside it got work after it had none
QUIET: What = "quiet"  # the engines were found without work


class Row(NamedTuple):
    """Something that happened, in seconds of the machine's monotonic clock.

    Attributes:
        end: of a micro-batch; else as `begin`.
        number: of the lease.
    """

    what: What
    begin: float
    end: float
    number: int = 0


class LeaseTrace:
    """The newest rows; written by any thread."""

    def __init__(self, most: int = 4096) -> None:
        self._rows: deque[Row] = deque(maxlen=most)
        self._lock = threading.Lock()

    def add(self, what: What, begin: float, end: float | None = None, number: int = 0) -> None:
        with self._lock:
            self._rows.append(Row(what, begin, begin if end is None else end, number))

    def rows(self) -> list[Row]:
        """In the order in which they began."""
        with self._lock:
            return sorted(self._rows, key=lambda row: row.begin)


class Delay(NamedTuple):
    """What load that came back met with. seconds: until the last micro-batch ended that it can have waited for.
    micro_batches: how many of them there were."""

    seconds: float
    micro_batches: int


def delays(rows: Iterable[Row], after: What = LOAD) -> list[Delay]:
    """For each return of load, until the engines were quiet again, or for each END of a lease, until there was another.

    Under a lease of kind "load" training is meant to go on beside requests, and so counts.
    """
    ordered = sorted(rows, key=lambda row: row.begin)
    batches = [row for row in ordered if row.what == MICRO_BATCH]
    closing = (after, QUIET if after == LOAD else LEASE)
    found = []
    for place, mark in enumerate(ordered):
        if mark.what == after:
            stop = next((row.begin for row in ordered[place + 1 :] if row.what in closing), inf)
            met = [row for row in batches if row.end > mark.begin and row.begin < stop]
            found.append(Delay(max((row.end - mark.begin for row in met), default=0.0), len(met)))
    return found


def chrome_events(rows: Iterable[Row], pid: int = 0, zero: float = 0.0) -> list[dict[str, Any]]:
    """For Perfetto. zero: the trace's beginning, in the rows' seconds."""
    events = []
    for row in rows:
        common = {"name": row.what, "pid": pid, "tid": 0, "ts": (row.begin - zero) * 1e6, "args": {"lease": row.number}}
        kind = {"ph": "X", "dur": (row.end - row.begin) * 1e6} if row.what == MICRO_BATCH else {"ph": "i", "s": "p"}
        events.append(common | kind)
    return events
