"""What a rank did and when, from its own time stamps, and what share of a step that was."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from stepladder.parallel.residual import Block, Pending, Reduce

MODULE, REST = "module", "rest"  # kinds of compute: a block's modules; embedding, contexts and head
WAIT, REDUCE, MESSAGE = "wait", "reduce", "message"  # kinds of communication
Window = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """Something that one rank did, in seconds of the machine's monotonic clock."""

    kind: str
    name: str
    begin: float
    end: float


class Recorder:
    """Wraps blocks and reduces of a CPU rank; `spans` are in the order in which they ended.

    Args:
        late: seconds that the group adds to every reduce.
    """

    def __init__(self, late: float = 0.0) -> None:
        self.spans: list[Span] = []
        self.late, self._reduces = late, 0

    def take(self) -> list[Span]:
        """All spans since the last call."""
        taken, self.spans = self.spans, []
        return taken

    @contextmanager
    def rest(self, name: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.spans.append(Span(REST, name, began, perf_counter()))

    def block(self, block: Block, name: str, lag: int) -> Block:
        """The block with this lag; recorded under this name if it has modules here."""

        def compute(x: Tensor, context: Any) -> Tensor:
            began = perf_counter()
            result = block(x, context)
            self.spans.append(Span(MODULE, name, began, perf_counter()))
            return result

        return computing(block, compute, lag)

    def reduce(self, reduce: Reduce) -> Reduce:
        def started(partial: Tensor) -> Pending:
            name, self._reduces = f"reduce {self._reduces}", self._reduces + 1
            pending = reduce(partial)
            return _Recorded(self, name, perf_counter(), pending)

        return started


class _Recorded:
    def __init__(self, recorder: Recorder, name: str, issued: float, pending: Any) -> None:
        self._recorder, self._name, self._issued, self._pending = recorder, name, issued, pending
        self._landed = issued
        self._stamped = pending.work.get_future().then(self._stamp)

    def wait(self) -> Tensor:
        asked = perf_counter()
        tensor = self._pending.wait()
        self._stamped.wait()
        returned = perf_counter()
        done = min(self._landed + self._recorder.late, returned)
        self._recorder.spans += [Span(WAIT, self._name, asked, returned), Span(REDUCE, self._name, self._issued, done)]
        return tensor

    def _stamp(self, future: Any) -> None:
        self._landed = perf_counter()


def computing(block: Block, module: Any, lag: int) -> Block:
    """The block with this lag and this module in place of those that it has here, if any."""
    return Block(lag, [module] if block.modules else (), block.elsewhere, block.layer, block.seats)


def busy(spans: Iterable[Span], windows: Sequence[Window]) -> float:
    """The share of the windows that a rank spent in its modules."""
    return covered([s for s in spans if s.kind == MODULE], windows) / sum(end - begin for begin, end in windows)


def exposed(spans: Sequence[Span], windows: Sequence[Window]) -> float:
    """Seconds of a window in which nobody computed, the median. spans: of all ranks."""
    return median(end - begin - covered(spans, [(begin, end)]) for begin, end in windows)


def covered(spans: Iterable[Span], windows: Sequence[Window]) -> float:
    """Seconds of the windows, which do not overlap, in which there is at least one span."""
    total, ordered = 0.0, sorted(spans, key=lambda span: span.begin)
    for begin, end in windows:
        reached = begin
        for span in ordered:
            total += max(0.0, min(span.end, end) - max(span.begin, reached))
            reached = min(end, max(reached, span.end))
    return total
