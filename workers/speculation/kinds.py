"""The registry of drafters: what `speculate=...` may name, and what a drafter may ask for."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.speculation.drafter import Drafter
from stepladder.workers.speculation.drafters.model import ModelDrafter, Runner
from stepladder.workers.speculation.drafters.ngram import NGram
from stepladder.workers.speculation.drafters.recycling import Recycling
from stepladder.workers.speculation.drafters.suffix import Suffix

__all__ = ["KINDS", "WITH_HEAD", "WITH_WEIGHTS", "Runner", "Seat", "Target"]


class Seat(NamedTuple):
    """What a drafter is made for. threshold: the confidence where it stops; costly: the same where a further token
    takes time, None if that is to be weighed (`Price`). memory: tokens that it may remember. model: a directory, if it
    has weights from the beginning. limits: of the engine. target: what it drafts for."""

    threshold: float
    costly: float | None
    memory: int
    model: str | None
    limits: SchedulerConfig
    target: "Target"


class Target(Protocol):
    """The model that is drafted for."""

    @property
    def vocab_size(self) -> int: ...

    def runner(self, path: str, limits: SchedulerConfig) -> Runner:
        """What runs another model of the same tokenizer, with a cache. ValueError: it is unusable."""

    def head(self, path: str) -> Any:
        """The `Cell` of a head that was made for this model. ValueError: it is unusable."""


def _head(seat: Seat) -> Any:
    from stepladder.workers.speculation.drafters.head import HeadDrafter  # torch, which reading options needs not

    return HeadDrafter(seat.target.head(seat.model) if seat.model else None, seat.costly)


def _hybrid(seat: Seat) -> Drafter:
    from stepladder.workers.speculation.drafters.hybrid import Hybrid

    return Hybrid(Suffix(seat.memory, seat.threshold), _head(seat))


KINDS: dict[str, Callable[[Seat], Drafter]] = {
    "ngram": lambda seat: NGram(threshold=seat.threshold),
    "suffix": lambda seat: Suffix(seat.memory, seat.threshold),
    "recycling": lambda seat: Recycling(seat.target.vocab_size, threshold=seat.threshold),
    "model": lambda seat: ModelDrafter(seat.target.runner(seat.model or "", seat.limits), seat.limits, seat.costly),
    "head": _head,
    "hybrid": _hybrid,
}
WITH_HEAD = ("head", "hybrid")
WITH_WEIGHTS = ("model", *WITH_HEAD)  # they read a directory
