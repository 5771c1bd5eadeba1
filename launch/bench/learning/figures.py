"""What blocks with and without training, and the trace of leases, come to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepladder.launch.bench.learning.traffic import Load
from stepladder.launch.bench.rig.paired import RESAMPLES
from stepladder.workers.speculation.learning.lease_trace import END, LOAD, MICRO_BATCH, Row, delays

Places = NDArray[np.intp]  # of blocks


class Done(NamedTuple):
    """So far. core_seconds: in micro-batches. process_seconds: of CPU time, of the trainer's processes, which also read
    what was captured. begun: micro-batches. ended: leases. late: micro-batches, and seconds, after the end of one."""

    begun: float = 0.0
    steps: float = 0.0
    core_seconds: float = 0.0
    process_seconds: float = 0.0
    ended: float = 0.0
    late: float = 0.0
    late_seconds: float = 0.0

    def since(self, before: "Done") -> "Done":
        return Done(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Block:
    """allowed: whether there was training. done: by the trainer meanwhile."""

    allowed: bool
    load: Load
    done: Done

    @property
    def seconds(self) -> float:
        return self.load.end - self.load.begin

    def to_json(self) -> dict[str, Any]:
        times = [(t.ttft, t.tpot, t.output_tokens) for t in self.load.timings if t.success]
        more = {"seconds": self.seconds, "busy_seconds": self.load.busy_seconds, "done": self.done._asdict()}
        return {"allowed": self.allowed, "requests_ttft_tpot_tokens": times, **more}


class Figure(NamedTuple):
    """of: what a block has of it, an array. over: what the arrays of some blocks, joined, come to."""

    of: Callable[[Block], Any]
    over: Callable[[Any], float]
    unit: str

    def __call__(self, blocks: Sequence[Block]) -> float:
        return self.over(np.concatenate([self.of(block) for block in blocks]))


def _times(name: str, percent: float) -> Figure:
    """A percentile over all requests of some blocks, in ms."""

    def of(block: Block) -> Any:
        return np.array([getattr(t, name) * 1e3 for t in block.load.timings if t.success])

    return Figure(of, lambda values: float(np.percentile(values, percent)), "ms")


def _rate() -> Figure:
    """Tokens per second in which requests were under way."""

    def of(block: Block) -> Any:
        return np.array([(sum(t.output_tokens for t in block.load.timings if t.success), block.load.busy_seconds)])

    def over(values: Any) -> float:
        tokens, seconds = values.sum(0)
        return float(tokens / seconds)

    return Figure(of, over, "tokens/s")


P99 = "TPOT p99"
FIGURES = {
    "TPOT p50": _times("tpot", 50),
    P99: _times("tpot", 99),
    "TTFT p50": _times("ttft", 50),
    "tokens per busy second": _rate(),
}


class Compared(NamedTuple):
    """value: a figure with training over the same without, with a 95% interval. spread: what such a ratio is off 1, in
    95 % of cases, where there is nothing to compare: between blocks of one kind."""

    value: float
    low: float
    high: float
    spread: float


def compared(blocks: Sequence[Block], figure: Figure) -> Compared:
    """The interval is the percentile bootstrap over neighbours of different kinds, which share their moment. The spread
    is from neighbours of one kind, one of each pair on either side, by lot.

    Args:
        blocks: all have served something.
    """
    values = [figure.of(block) for block in blocks]

    def ratio(first: Places, second: Places) -> float:
        over, under = (figure.over(np.concatenate([values[place] for place in side])) for side in (first, second))
        return over / under

    draw = np.random.default_rng(0)
    on = np.array([place for place, block in enumerate(blocks) if block.allowed])
    off = on ^ 1  # neighbours 0 and 1, 2 and 3
    assert not any(blocks[place].allowed for place in off)
    drawn = [ratio(on[chosen], off[chosen]) for chosen in draw.integers(len(on), size=(RESAMPLES, len(on)))]
    low, high = np.percentile(drawn, [2.5, 97.5])
    alike = np.arange(1, len(blocks) - 1, 2)
    lots = draw.integers(2, size=(RESAMPLES, len(alike)))
    chance = [max(one := ratio(alike + lot, alike + 1 - lot), 1 / one) - 1 for lot in lots]
    return Compared(ratio(on, off), float(low), float(high), float(np.percentile(chance, 95)))


@dataclass(frozen=True)
class Waits:
    """What the trace of all ranks says of one kind of mark: load that came back, or ends of leases.

    Attributes:
        marks: of the rank that has most. met: of all ranks, by how many training went on after. most: micro-batches.
            longest: seconds.
    """

    marks: int
    met: int
    most: int
    longest: float
    seconds: list[float]

    @classmethod
    def of(cls, traces: Sequence[Sequence[Row]], what: Any) -> "Waits":
        found = [delays(rows, what) for rows in traces]
        met = [one for ones in found for one in ones if one.micro_batches]
        most, longest = max((o.micro_batches for o in met), default=0), max((o.seconds for o in met), default=0.0)
        return cls(max(map(len, found), default=0), len(met), most, longest, [one.seconds for one in met])


@dataclass(frozen=True)
class Traced:
    """returns: of load. ends: of leases. batches: micro-batches of all ranks. begin: of the oldest row."""

    returns: Waits
    ends: Waits
    batches: list[Row]
    begin: float

    @classmethod
    def of(cls, traces: Sequence[Sequence[Row]]) -> "Traced | None":
        """None if nothing was traced."""
        rows = [row for trace in traces for row in trace]
        if not rows:
            return None
        batches = [row for row in rows if row.what == MICRO_BATCH]
        return cls(Waits.of(traces, LOAD), Waits.of(traces, END), batches, min(row.begin for row in rows))

    def within(self, blocks: Sequence[Block]) -> int:
        """Micro-batches that were under way in some of these."""
        spans = [(block.load.begin, block.load.end) for block in blocks]
        return sum(any(row.begin < end and row.end > begin for begin, end in spans) for row in self.batches)
