"""Where what an engine captured waits for whoever learns from it; when there is no room, the oldest goes."""

import logging
from collections import deque
from dataclasses import dataclass, field
from threading import Lock

from stepladder.workers.figures import counter, gauge
from stepladder.workers.speculation.learning.lessons import Captured

__all__ = ["Ring", "RingStats"]

OVERHEAD = 1024  # bytes of a piece that are not numbers: three tensors and what holds them
MOST_DOMAINS = 256  # that have something here at once: clients name them

log = logging.getLogger(__name__)


@dataclass
class RingStats:
    """captured_tokens: of everything that came. dropped_tokens: of these, those for which there was no room before
    somebody took them. held_bytes: of what waits."""

    captured_tokens: int = counter("learning_captured_tokens", "Tokens kept for learning, with their hidden states.")
    dropped_tokens: int = counter("learning_dropped_tokens", "Of these, those for which there was no room in the ring.")
    held_bytes: int = gauge("learning_held_bytes", "Bytes that wait in the ring.")


@dataclass
class _Domain:
    pieces: deque[Captured] = field(default_factory=deque)
    bytes: int = 0


class Ring:
    """Thread-safe. `put` never waits: while somebody takes, what came is sorted in by whoever comes next.

    Args:
        max_bytes: that are kept. Beyond them the oldest pieces of the largest domain go; the log says so once.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.stats = max_bytes, RingStats()
        self._came: deque[Captured] = deque()
        self._lock = Lock()
        self._domains: dict[str, _Domain] = {}  # none is empty; the first one has the next turn

    def put(self, captured: Captured) -> None:
        """Keep a piece."""
        self._came.append(captured)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def take(self, tokens: int, max_bytes: int = 1 << 62) -> list[Captured]:
        """Up to so many tokens and bytes, or one piece that has more; domains in turns, of each the oldest. They leave.

        Pieces of one request come in the order in which they were put."""
        taken = list[Captured]()
        with self._lock:
            self._sort_in()
            while self._domains:
                name = next(iter(self._domains))
                oldest = self._domains[name].pieces[0]
                tokens, max_bytes = tokens - len(oldest.lesson.tokens), max_bytes - _size(oldest)
                if taken and min(tokens, max_bytes) < 0:
                    break
                domain = self._domains.pop(name)
                self._domains[name] = domain  # it is the last one's turn now
                taken.append(self._pop(name))
        return taken

    def _sort_in(self) -> None:
        while self._came:
            captured = self._came.popleft()
            self.stats.captured_tokens += len(captured.lesson.tokens)
            if captured.domain not in self._domains and len(self._domains) >= MOST_DOMAINS:
                self._drop(captured)
                continue
            domain = self._domains.setdefault(captured.domain, _Domain())
            domain.pieces.append(captured)
            domain.bytes += _size(captured)
            self.stats.held_bytes += _size(captured)
            while self.stats.held_bytes > self.max_bytes:
                largest = max(self._domains, key=lambda name: self._domains[name].bytes)
                self._drop(self._pop(largest))

    def _drop(self, captured: Captured) -> None:
        if not self.stats.dropped_tokens:
            log.warning(
                "more answers wait to be learnt from than the ring holds: %.4g MiB (train.ring_mb), of %d domains at "
                "most; from here on some are dropped, and counted", self.max_bytes / (1 << 20), MOST_DOMAINS,
            )  # fmt: skip
        self.stats.dropped_tokens += len(captured.lesson.tokens)

    def _pop(self, name: str) -> Captured:
        """The oldest piece of a domain."""
        domain = self._domains[name]
        captured = domain.pieces.popleft()
        domain.bytes -= _size(captured)
        self.stats.held_bytes -= _size(captured)
        if not domain.pieces:
            del self._domains[name]
        return captured


def _size(captured: Captured) -> int:
    return sum(tensor.nbytes for tensor in captured.lesson) + OVERHEAD
