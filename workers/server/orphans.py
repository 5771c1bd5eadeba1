"""Requests whose gateway was lost. They run on for a while, so that a retry continues instead of starting again."""

from dataclasses import dataclass, field, replace
from time import monotonic

from stepladder.workers.core import FinishReason, Output, Request


@dataclass
class Orphan:
    """tokens: everything generated so far. until: when it is given up (`time.monotonic`)."""

    request: Request
    tokens: list[int]
    until: float
    finish_reason: FinishReason | None = None

    def answers(self, request: Request) -> bool:
        """Whether `request` is a retry of this one: the same name, owner, labels, prompt and sampling parameters.

        A retry may bring another seed, since a client that names none gets a random one each time; one that names a
        seed is another owner.
        """
        mine, seed = self.request, request.params.seed
        same = _who(mine) == _who(request) and mine.prompt == request.prompt
        same = same and replace(mine.params, seed=seed) == request.params
        return same and len(self.tokens) >= len(request.output)


@dataclass
class Orphans:
    """By the names that clients know requests under.

    Args:
        seconds: how long a request waits for its client to come back.
    """

    seconds: float
    _by_id: dict[str, Orphan] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(orphan.request.name for orphan in self._by_id.values()))

    def take_in(self, request: Request, tokens: list[int]) -> None:
        self._by_id[request.id] = Orphan(request, tokens, monotonic() + self.seconds)

    def note(self, output: Output) -> None:
        """The engine went on with a request that may be one of these."""
        if orphan := self._by_id.get(output.id):
            orphan.tokens.extend(output.tokens)
            orphan.finish_reason = output.finish_reason

    def give_out(self, request: Request) -> Orphan | None:
        """The orphan that `request` is a retry of; of several, the one that has come furthest."""
        fitting = [orphan for orphan in self._by_id.values() if orphan.answers(request)]
        if not fitting:
            return None
        return self._by_id.pop(max(fitting, key=lambda orphan: len(orphan.tokens)).request.id)

    def expired(self) -> list[Request]:
        """Forget those that have waited long enough, and return them."""
        now = monotonic()
        gone = [request_id for request_id, orphan in self._by_id.items() if orphan.until < now]
        return [self._by_id.pop(request_id).request for request_id in gone]


def _who(request: Request) -> tuple[str, str, str, bool]:
    return request.name, request.owner, request.domain, request.learn
