"""Chrome trace events, which Perfetto draws: processes with lanes, and what there was in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepladder.launch.bench.rig.spans import Span

Event = dict[str, Any]
Trace = dict[str, Any]


def process(pid: int, name: str, lanes: Sequence[str]) -> list[Event]:
    """Its name and those of its lanes, whose numbers (tid) are their places."""
    names = [("process_name", 0, name), *(("thread_name", tid, lane) for tid, lane in enumerate(lanes))]
    return [{"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": value}} for kind, tid, value in names]


def took(span: Span, zero: float, **common: Any) -> Event:
    """One thing at a time in its lane. zero: the trace's beginning. common: pid, tid, cat, name."""
    return {"ph": "X", "ts": (span.begin - zero) * 1e6, "dur": (span.end - span.begin) * 1e6, **common}


def under_way(span: Span, zero: float, key: str, **common: Any) -> list[Event]:
    """An asynchronous slice, of which several may be in a lane at once. key: that nothing else in the trace has."""
    begin, end = (span.begin - zero) * 1e6, (span.end - zero) * 1e6
    return [{"ph": ph, "ts": at, "id": key, **common} for ph, at in (("b", begin), ("e", end))]


def traced(events: Sequence[Event]) -> Trace:
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(trace: Trace, case: str, path: Path) -> None:
    """The trace of this case; where it cannot be written, says so: what was measured is worth more than its trace."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trace | {"otherData": {"case": case}}))
    except OSError as error:
        print(f"the trace is not written: {error}")
    else:
        print(f"trace of {case} written to {path}; open it in https://ui.perfetto.dev")
