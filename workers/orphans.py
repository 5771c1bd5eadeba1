"""Requests whose gateway was lost. They run on for a while, so that a retry continues instead of starting again."""

from dataclasses import dataclass, field
from time import monotonic

from workers.core import FinishReason, Output, Request


@dataclass
class Orphan:
    """tokens: everything generated so far. until: when it is given up (`time.monotonic`)."""

    request: Request
    tokens: list[int]
    until: float
    finish_reason: FinishReason | None = None


@dataclass
class Orphans:
    """By the name that the client knows a request under; the engine's id is that name, `#` and the attempt.

    Args:
        seconds: how long a request waits for its client to come back.
    """

    seconds: float
    _by_name: dict[str, Orphan] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def take_in(self, request: Request, tokens: list[int]) -> None:
        self._by_name[name_of(request.id)] = Orphan(request, tokens, monotonic() + self.seconds)

    def note(self, output: Output) -> None:
        """The engine went on with a request that may be one of these."""
        orphan = self._by_name.get(name_of(output.id))
        if orphan and orphan.request.id == output.id:
            orphan.tokens.extend(output.tokens)
            orphan.finish_reason = output.finish_reason

    def give_out(self, request: Request) -> Orphan | None:
        """The orphan that `request` is a retry of: the same name, prompt and limits. A retry may bring another seed."""
        orphan = self._by_name.get(name_of(request.id))
        if orphan is None or orphan.request.prompt != request.prompt:
            return None
        if orphan.request.params.max_tokens != request.params.max_tokens or len(orphan.tokens) < len(request.output):
            return None
        return self._by_name.pop(name_of(request.id))

    def expired(self) -> list[Request]:
        """Forget those that have waited long enough, and return them."""
        now = monotonic()
        gone = [name for name, orphan in self._by_name.items() if orphan.until < now]
        return [self._by_name.pop(name).request for name in gone]


def name_of(request_id: str) -> str:
    return request_id.rsplit("#", 1)[0]
