"""The picture that Perfetto draws of one decode step: what A and F compute, and what is under way between them."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.launch.bench.afd.real.task import Decoded, Moment
from stepladder.launch.bench.overlap.task import Span

LANES = ("A compute", "A -> F", "F compute", "F -> A")


def perfetto(turns: Mapping[str, Sequence[Decoded]]) -> dict[str, Any]:
    """Chrome trace events of the last step of each turn: a process per case. turns: by case, the answers of A and F."""
    events: list[dict[str, Any]] = []
    for pid, (case, (a, f)) in enumerate(turns.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": case}})
        for tid, lane in enumerate(LANES):
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
        begin, end = a.steps[-1]
        lanes = [a.compute, messages(a.sent, f.came), f.compute, messages(f.sent, a.came)]
        for tid, spans in enumerate(lanes):
            for number, span in enumerate(s for s in spans if begin <= s.begin <= end):
                events += _events(span, pid, tid, f"{pid}.{tid}.{number}", begin)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def messages(sent: Sequence[Moment], came: Sequence[Moment]) -> list[Span]:
    """From being given to the link to being readable at the other end, in the order in which they were sent."""
    arrivals = {(m.step, m.block, m.micro): m.at for m in came}
    return [Span("message", _name(m), m.at, arrivals[m.step, m.block, m.micro]) for m in sent]


def _name(message: Moment) -> str:
    what = "x_0" if message.block < 0 else f"{('attention', 'ffn')[message.block % 2]} {message.block // 2}"
    return f"{what}, micro-batch {message.micro}"


def _events(span: Span, pid: int, tid: int, key: str, zero: float) -> list[dict[str, Any]]:
    """Messages are asynchronous slices of one name, so that they share a lane though several are under way at once."""
    begin, length = (span.begin - zero) * 1e6, (span.end - span.begin) * 1e6
    common: dict[str, Any] = {"cat": span.kind, "pid": pid, "tid": tid}
    if span.kind != "message":
        return [{"ph": "X", "name": span.name, "ts": begin, "dur": length, **common}]
    common |= {"name": LANES[tid], "id": key, "args": {"message": span.name}}
    return [{"ph": "b", "ts": begin, **common}, {"ph": "e", "ts": begin + length, **common}]
