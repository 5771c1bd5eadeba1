"""The registry of drafters: what `speculate=...` may name, and what a drafter may ask for."""

from collections.abc import Callable
from typing import NamedTuple

from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.drafter import Drafter
from stepladder.workers.speculation.drafters.model import ModelDrafter, Runner
from stepladder.workers.speculation.drafters.ngram import NGram
from stepladder.workers.speculation.drafters.recycling import Recycling
from stepladder.workers.speculation.drafters.suffix import Suffix

__all__ = ["KINDS", "Runner", "Seat"]


class Seat(NamedTuple):
    """What a drafter is made for. threshold: the confidence where it stops. memory: tokens that it may remember. model:
    a directory, if it has weights. limits: of the engine. vocabulary: the target's size of it. load: makes what runs
    a directory, with a cache."""

    threshold: float
    memory: int
    model: str | None
    limits: SchedulerConfig
    vocabulary: int
    load: Callable[[str], Runner]


KINDS: dict[str, Callable[[Seat], Drafter]] = {
    "ngram": lambda seat: NGram(threshold=seat.threshold),
    "suffix": lambda seat: Suffix(seat.memory, seat.threshold),
    "recycling": lambda seat: Recycling(seat.vocabulary, threshold=seat.threshold),
    "model": lambda seat: ModelDrafter(seat.load(seat.model or ""), seat.limits, seat.threshold),
}
