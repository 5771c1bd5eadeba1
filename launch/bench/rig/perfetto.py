"""Chrome trace events, which Perfetto draws: processes with lanes, and what there was in them."""

from collections.abc import Sequence
from typing import Any

from stepladder.launch.bench.rig.spans import Span

Event = dict[str, Any]


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
