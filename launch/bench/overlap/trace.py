"""What a rank did during one step, from its own time stamps, and the picture of it that Perfetto draws."""

from collections.abc import Iterable
from itertools import pairwise
from time import perf_counter
from typing import Any

from torch import Tensor

from stepladder.launch.bench.overlap.task import Span
from stepladder.parallel.residual import Block, Pending, Reduce


class Recorder:
    """Wraps blocks and reduces of a CPU rank; `spans` are in the order in which they ended.

    Args:
        late: seconds that the group adds to every reduce.
    """

    def __init__(self, late: float) -> None:
        self.spans: list[Span] = []
        self._late, self._reduces = late, 0

    def block(self, block: Block, name: str) -> Block:
        def compute(x: Tensor, context: Any) -> Tensor:
            began = perf_counter()
            result = block(x, context)
            self.spans.append(Span("compute", name, began, perf_counter()))
            return result

        return Block(block.lag, [compute])

    def reduce(self, reduce: Reduce) -> Reduce:
        def started(partial: Tensor) -> Pending:
            name, self._reduces = f"reduce {self._reduces}", self._reduces + 1
            pending = reduce(partial)
            return _Recorded(self, name, perf_counter(), pending)

        return started

    def waited(self, name: str, issued: float, asked: float, landed: float) -> None:
        returned = perf_counter()
        done = min(landed + self._late, returned)
        self.spans += [Span("wait", name, asked, returned), Span("reduce", name, issued, done)]


class _Recorded:
    def __init__(self, recorder: Recorder, name: str, issued: float, pending: Any) -> None:
        self._recorder, self._name, self._issued, self._pending = recorder, name, issued, pending
        self._landed = issued
        self._stamped = pending.work.get_future().then(self._stamp)

    def wait(self) -> Tensor:
        asked = perf_counter()
        tensor = self._pending.wait()
        self._stamped.wait()
        self._recorder.waited(self._name, self._issued, asked, self._landed)
        return tensor

    def _stamp(self, future: Any) -> None:
        self._landed = perf_counter()


def hidden_share(spans: Iterable[Span]) -> float:
    """The share of the reduces' time during which the rank did anything but wait."""
    spans = list(spans)
    waits = [s for s in spans if s.kind == "wait"]
    reduces = [s for s in spans if s.kind == "reduce"]
    return 1 - sum(_overlap(r, w) for r in reduces for w in waits) / sum(r.end - r.begin for r in reduces)


def under_the_next_block(spans: Iterable[Span]) -> float:
    """Of the reduces that have a block computed after theirs, how many were on their way while it was."""
    spans = list(spans)
    blocks = sorted((s for s in spans if s.kind == "compute"), key=lambda s: s.begin)
    reduces = sorted((s for s in spans if s.kind == "reduce"), key=lambda s: s.begin)[1:]  # without the embedding's
    met = [_overlap(reduce, following) > 0 for reduce, (_, following) in zip(reduces, pairwise(blocks), strict=False)]
    return sum(met) / len(met)


def perfetto(steps: dict[str, list[list[Span]]]) -> dict[str, Any]:
    """Chrome trace events: a process per wiring and rank with a lane for compute and waiting and one for reduces."""
    events: list[dict[str, Any]] = []
    for number, (wiring, ranks) in enumerate(steps.items()):
        zero = min(span.begin for spans in ranks for span in spans)
        for rank, spans in enumerate(ranks):
            pid = number * len(ranks) + rank
            events.append(_named("process_name", pid, 0, f"{wiring}, rank {rank}"))
            events.append(_named("thread_name", pid, 0, "compute"))
            events.append(_named("thread_name", pid, 1, "communication"))
            events += [event for span in spans for event in _events(span, pid, zero)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(span: Span, pid: int, zero: float) -> list[dict[str, Any]]:
    """Reduces are asynchronous slices, since two of them may be on their way at once."""
    begin, length = (span.begin - zero) * 1e6, (span.end - span.begin) * 1e6
    if span.kind != "reduce":
        return [{"ph": "X", "name": span.name if span.kind == "compute" else f"wait for {span.name}",
                 "cat": span.kind, "pid": pid, "tid": 0, "ts": begin, "dur": length}]  # fmt: skip
    common = {"name": span.name, "cat": "reduce", "pid": pid, "tid": 1, "id": f"{pid}.{span.name}"}
    return [{"ph": "b", "ts": begin, **common}, {"ph": "e", "ts": begin + length, **common}]


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _overlap(a: Span, b: Span) -> float:
    return max(0.0, min(a.end, b.end) - max(a.begin, b.begin))
