"""What happened around a lease and when, so that how long returning load waits can be read from it."""

import json
import os
import threading
from collections import deque
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from stepladder.workers.speculation.learning.lease import UNDER_LOAD, Kind

What = Literal["micro_batch", "lease", "end", "load", "quiet"]
MICRO_BATCH: What = "micro_batch"
LEASE: What = "lease"  # is in force from then on, or is of another kind
END: What = "end"  # of the lease: revoked, past its deadline, given back
LOAD: What = "load"  # an engine beside it got work after it had none
QUIET: What = "quiet"  # the engines were found without work


class Row(NamedTuple):
    """Something that happened, in seconds of the machine's monotonic clock.

    Attributes:
        end: of a micro-batch; else as `begin`.
        number: of the lease. kind: of the lease under which a micro-batch began, or that is in force.
    """

    what: What
    begin: float
    end: float
    number: int = 0
    kind: Kind | None = None


class LeaseTrace:
    """The newest rows; written by any thread."""

    def __init__(self, most: int = 16384) -> None:
        self._rows: deque[Row] = deque(maxlen=most)
        self._lock = threading.Lock()

    def add(
        self, what: What, begin: float, end: float | None = None, number: int = 0, kind: Kind | None = None
    ) -> None:
        with self._lock:
            self._rows.append(Row(what, begin, begin if end is None else end, number, kind))

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

    What begins under a lease of kind "load" after load has come back is no delay: it is meant to go on beside requests.
    """
    ordered = sorted(rows, key=lambda row: row.begin)
    batches = [row for row in ordered if row.what == MICRO_BATCH]
    closing = (after, QUIET if after == LOAD else LEASE)
    found = []
    for place, mark in enumerate(ordered):
        if mark.what == after:
            stop = next((row.begin for row in ordered[place + 1 :] if row.what in closing), inf)
            met = [row for row in batches if row.end > mark.begin and row.begin < stop]
            if after == LOAD:
                met = [row for row in met if row.begin <= mark.begin or row.kind != UNDER_LOAD]
            found.append(Delay(max((row.end - mark.begin for row in met), default=0.0), len(met)))
    return found


def chrome_events(rows: Iterable[Row], pid: int = 0, zero: float = 0.0) -> list[dict[str, Any]]:
    """For Perfetto. zero: the trace's beginning, in the rows' seconds."""
    events = []
    for row in rows:
        about = {"lease": row.number} | ({"kind": row.kind} if row.kind else {})
        common = {"name": row.what, "pid": pid, "tid": 0, "ts": (row.begin - zero) * 1e6, "args": about}
        kind = {"ph": "X", "dur": (row.end - row.begin) * 1e6} if row.what == MICRO_BATCH else {"ph": "i", "s": "p"}
        events.append(common | kind)
    return events


def trace_path(drafters: Path, rank: int) -> Path:
    """Of a trainer's rank, in the folder of a drafter's versions."""
    return drafters / f"lease-trace-{rank}.json"


def write_trace(rows: Iterable[Row], path: Path, rank: int = 0) -> None:
    """For Perfetto and for `read_trace`; there whole or not at all. Times are those of the machine's monotonic clock.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    name = {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"trainer rank {rank}"}}
    text = json.dumps({"traceEvents": [name, *chrome_events(rows, rank)], "displayTimeUnit": "ms"})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_trace(path: Path) -> list[Row]:
    """What `write_trace` has written.

    Raises:
        OSError, ValueError, KeyError: it is not there, or is no such file.
    """
    rows = []
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["name"] in get_args(What):
            begin, about = event["ts"] / 1e6, event["args"]
            rows.append(
                Row(event["name"], begin, begin + event.get("dur", 0.0) / 1e6, about["lease"], about.get("kind"))
            )
    return rows
