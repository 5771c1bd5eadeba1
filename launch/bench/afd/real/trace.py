"""The picture that Perfetto draws of one decode step: what A and F compute, and what is under way between them."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.launch.bench.afd.real.task import Decoded, Moment
from stepladder.launch.bench.rig.perfetto import Event, drawn, process
from stepladder.launch.bench.rig.spans import MESSAGE, Span

LANES = ("A compute", "A -> F", "F compute", "F -> A")


def perfetto(turns: Mapping[str, Sequence[Decoded]]) -> dict[str, list[Event]]:
    """Of the last step of each turn: a process per case. turns: by case, the answers of A and F."""
    events: list[Event] = []
    for pid, (case, (a, f)) in enumerate(turns.items()):
        events += process(pid, case, LANES)
        begin, end = a.steps[-1]
        lanes = [a.compute, messages(a.sent, f.came), f.compute, messages(f.sent, a.came)]
        for tid, spans in enumerate(lanes):
            for number, span in enumerate(s for s in spans if begin <= s.begin <= end):
                look: dict[str, Any] = {"name": span.name}
                if span.kind == MESSAGE:  # of one name, so that they share a lane though several are under way at once
                    look = {"name": LANES[tid], "args": {"message": span.name}}
                events += drawn(span, begin, f"{pid}.{tid}.{number}", pid=pid, tid=tid, cat=span.kind, **look)
    return {"traceEvents": events}


def messages(sent: Sequence[Moment], came: Sequence[Moment]) -> list[Span]:
    """From being given to the link to being readable at the other end, in the order in which they were sent."""
    arrivals = {(m.step, m.block, m.micro): m.at for m in came}
    return [Span(MESSAGE, f"{m.block}, micro-batch {m.micro}", m.at, arrivals[m.step, m.block, m.micro]) for m in sent]
