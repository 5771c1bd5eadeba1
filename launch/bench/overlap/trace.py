"""What a step's trace says about its reduces, and the picture of it that Perfetto draws."""

from collections.abc import Iterable

from stepladder.launch.bench.rig.perfetto import Event, drawn, process
from stepladder.launch.bench.rig.spans import MODULE, REDUCE, WAIT, Span, covered

LOOKS = {
    MODULE: (0, "compute", "{}"),
    WAIT: (0, "wait", "wait for {}"),
    REDUCE: (1, "reduce", "{}"),
}  # lane, cat, name


def hidden_share(spans: Iterable[Span]) -> float:
    """The share of the reduces' time during which the rank did anything but wait."""
    spans = list(spans)
    waits = [s for s in spans if s.kind == WAIT]
    reduces = [s for s in spans if s.kind == REDUCE]
    return 1 - sum(covered(waits, [(r.begin, r.end)]) for r in reduces) / sum(r.end - r.begin for r in reduces)


def under_the_next_block(spans: Iterable[Span]) -> float:
    """Of the reduces that have a block computed after theirs, how many were on their way while it was."""
    spans = list(spans)
    blocks = sorted((s for s in spans if s.kind == MODULE), key=lambda s: s.begin)
    reduces = sorted((s for s in spans if s.kind == REDUCE), key=lambda s: s.begin)[1:]  # without the embedding's
    following = zip(reduces, blocks[1:], strict=False)
    met = [covered([reduce], [(block.begin, block.end)]) > 0 for reduce, block in following]
    return sum(met) / len(met)


def perfetto(steps: dict[str, list[list[Span]]]) -> dict[str, list[Event]]:
    """A process per wiring and rank with a lane for compute and waiting and one for reduces."""
    events: list[Event] = []
    for number, (wiring, ranks) in enumerate(steps.items()):
        zero = min(span.begin for spans in ranks for span in spans)
        for rank, spans in enumerate(ranks):
            pid = number * len(ranks) + rank
            events += process(pid, f"{wiring}, rank {rank}", ("compute", "communication"))
            for span in spans:
                tid, cat, name = LOOKS[span.kind]
                key, name = f"{pid}.{span.name}", name.format(span.name)
                events += drawn(span, zero, key, pid=pid, tid=tid, cat=cat, name=name)
    return {"traceEvents": events}
