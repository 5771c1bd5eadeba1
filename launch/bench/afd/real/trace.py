"""The picture that Perfetto draws of one decode step: what A and F compute, and what is under way between them."""

from collections.abc import Mapping, Sequence

from stepladder.launch.bench.afd.real.task import Decoded, Moment
from stepladder.launch.bench.rig.perfetto import Event, Trace, process, took, traced, under_way
from stepladder.launch.bench.rig.spans import MESSAGE, Span

LANES = ("A compute", "A -> F", "F compute", "F -> A")


def perfetto(turns: Mapping[str, Sequence[Decoded]]) -> Trace:
    """Of the last step of each turn: a process per case. turns: by case, the answers of A and F."""
    events: list[Event] = []
    for pid, (case, (a, f)) in enumerate(turns.items()):
        events += process(pid, case, LANES)
        begin, end = a.steps[-1]
        lanes = [a.compute, messages(a.sent, f.came), f.compute, messages(f.sent, a.came)]
        for tid, spans in enumerate(lanes):
            for number, span in enumerate(s for s in spans if begin <= s.begin <= end):
                events += _events(span, pid, tid, f"{pid}.{tid}.{number}", begin)
    return traced(events)


def messages(sent: Sequence[Moment], came: Sequence[Moment]) -> list[Span]:
    """From being given to the link to being readable at the other end, in the order in which they were sent."""
    arrivals = {(m.step, m.block, m.micro): m.at for m in came}
    return [Span(MESSAGE, f"{m.block}, micro-batch {m.micro}", m.at, arrivals[m.step, m.block, m.micro]) for m in sent]


def _events(span: Span, pid: int, tid: int, key: str, zero: float) -> list[Event]:
    """Messages are of one name, so that they share a lane though several are under way at once."""
    if span.kind != MESSAGE:
        return [took(span, zero, pid=pid, tid=tid, cat=span.kind, name=span.name)]
    return under_way(span, zero, key, pid=pid, tid=tid, cat=span.kind, name=LANES[tid], args={"message": span.name})
