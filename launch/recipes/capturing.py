"""What an engine's requests are answered, with the hidden states that every token was drawn from, by request."""

from collections.abc import Iterator
from contextlib import contextmanager

from stepladder.workers.engine import Engine
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.learning.lessons import Captured

PIECE = 64  # tokens of a piece, at most, as a server gives them


@contextmanager
def capturing(engine: Engine, piece: int = PIECE) -> Iterator[dict[int, list[Captured]]]:
    """Yields the pieces of every request by its `number_of`, in order; they are all there when the block has ended."""
    found: dict[int, list[Captured]] = {}
    engine.capture = Capture(lambda captured: found.setdefault(captured.request, []).append(captured), piece)
    try:
        yield found
        engine.capture.settle()
    finally:
        engine.capture = None
