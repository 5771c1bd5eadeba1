"""Chrome trace events, which Perfetto draws: processes with lanes, and what there was in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepladder.launch.bench.rig.spans import MESSAGE, REDUCE, Span

Event = dict[str, Any]


def process(pid: int, name: str, lanes: Sequence[str]) -> list[Event]:
    """Its name and those of its lanes, whose numbers (tid) are their places."""
    names = [("process_name", 0, name), *(("thread_name", tid, lane) for tid, lane in enumerate(lanes))]
    return [{"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": value}} for kind, tid, value in names]


def drawn(span: Span, zero: float, key: str, **common: Any) -> list[Event]:
    """One thing at a time in its lane, but of messages and reduces several may be under way at once.

    Args:
        zero: the trace's beginning. key: that nothing else in the trace has. common: pid, tid, cat, name.
    """
    begin, end = (span.begin - zero) * 1e6, (span.end - zero) * 1e6
    if span.kind in (MESSAGE, REDUCE):
        return [{"ph": ph, "ts": at, "id": key, **common} for ph, at in (("b", begin), ("e", end))]
    return [{"ph": "X", "ts": begin, "dur": (span.end - span.begin) * 1e6, **common}]


def write_trace(trace: Mapping[str, Any], case: str, path: Path) -> None:
    """The trace of this case; where it cannot be written, says so: what was measured is worth more than its trace."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**trace, "displayTimeUnit": "ms", "otherData": {"case": case}}))
    except OSError as error:
        print(f"the trace is not written: {error}")
    else:
        print(f"trace of {case} written to {path}; open it in https://ui.perfetto.dev")
