"""When ranks computed: recorded on them, and what share of a step that was."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from stepladder.launch.bench.afd.real.task import MODULE, REST
from stepladder.launch.bench.overlap.task import Span
from stepladder.parallel.residual import Block

Window = tuple[float, float]


class Recorder:
    """`spans` are in the order in which they ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def take(self) -> list[Span]:
        """All spans since the last call."""
        taken, self.spans = self.spans, []
        return taken

    @contextmanager
    def rest(self, name: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.spans.append(Span(REST, name, began, perf_counter()))

    def blocks(self, blocks: Sequence[Block], lag: int) -> list[Block]:
        """These blocks, attention and FFN in turn, with this lag; those that have modules here are recorded."""
        names = [f"{module} {layer}" for layer in range(len(blocks) // 2) for module in ("attention", "ffn")]
        return [
            Block(lag, [self._recorded(block, name)] if block.modules else (), block.elsewhere)
            for block, name in zip(blocks, names, strict=True)
        ]

    def _recorded(self, block: Block, name: str) -> Any:
        def compute(x: Tensor, context: Any) -> Tensor:
            began = perf_counter()
            result = block(x, context)
            self.spans.append(Span(MODULE, name, began, perf_counter()))
            return result

        return compute


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
