"""How much may wait before an engine, and for how long: what comes on top is refused, with the time to try again.

What has been accepted is served in time; without a bound, an overloaded engine works only for clients that have left.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from stepladder.workers.core import Output, Request, Sequence
from stepladder.workers.server.messages import Refusal

HALF_LIFE = 5.0  # seconds of work after which what was measured counts half
LEARNING_SECONDS = 1.0  # of work at a full batch, before which nothing is expected


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Of the requests that wait for a place.

    Attributes:
        tokens: of their prompts. requests: how many. seconds: how long the newest of them may have to wait.
    """

    tokens: int = 1 << 20
    requests: int = 1024
    seconds: float = 30.0


class Pace:
    """How fast an engine works what waits off, measured while others waited: a batch that is not full says nothing
    about what the engine can do. Everything fades."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._generated = self._ended = 0.0

    def stepped(self, tokens: int, seconds: float) -> None:
        """Steps ran so many tokens, prefill and decode alike."""
        fade = 0.5 ** (seconds / HALF_LIFE)
        self._tokens = self._tokens * fade + tokens
        self._seconds = self._seconds * fade + seconds

    def gave(self, outputs: list[Output]) -> None:
        """What steps generated, and how many requests came to their end by it."""
        ended = sum(output.finish_reason is not None for output in outputs)
        fade = 0.98**ended
        self._generated = self._generated * fade + sum(len(output.tokens) for output in outputs)
        self._ended = self._ended * fade + ended

    def work(self, request: Request) -> float:
        """Tokens that it will probably run: few generate as many as they may."""
        most = request.params.max_tokens - len(request.output)
        usual = self._generated / self._ended if self._ended else most
        return len(request.prompt) + len(request.output) + min(most, usual)

    def seconds(self, work: float) -> float | None:
        """That so much work takes; None as long as nobody knows."""
        return work * self._seconds / self._tokens if self._seconds >= LEARNING_SECONDS else None


class Queue:
    """Who may wait, judged from what waits already."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits, self.pace = limits, Pace()
        self._tokens = self._requests = 0
        self._work = 0.0

    def look(self, waiting: Iterable[Sequence]) -> None:
        """What waits now; `accepted` counts from there."""
        self._tokens = self._requests = 0
        self._work = 0.0
        for sequence in waiting:
            self.accepted(sequence.request)

    def accepted(self, request: Request) -> None:
        self._tokens += len(request.prompt) + len(request.output)
        self._requests += 1
        self._work += self.pace.work(request)

    def refusal(self, request: Request, patience: float | None) -> Refusal | None:
        """Why a request may not wait, and when to try again; None if it may.

        Args:
            patience: seconds after which its client will be gone; None if nobody knows.
        """
        limits, wait = self._limits, self.pace.seconds(self._work) if self._requests else 0.0
        longest = limits.seconds if patience is None else min(limits.seconds, patience)
        if self._requests >= limits.requests:
            why = f"the queue is full: {self._requests} requests wait"
        elif self._requests and self._tokens + len(request.prompt) > limits.tokens:
            why = f"the queue is full: requests with {self._tokens} tokens wait"
        elif wait is not None and wait > longest:
            why = f"the queue is full: a place would come after about {wait:.0f} s, more than {longest:.0f}"
        else:
            return None
        again = max(1.0, wait - longest if wait and wait > longest else (wait or 0.0) / 2)
        return Refusal(request.id, f"{why}; try again later", full=True, retry_after=again)
