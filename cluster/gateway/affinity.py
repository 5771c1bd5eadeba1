"""Which engine has probably cached the beginning of a prompt: a bounded memory of where prefixes were sent."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence


class PrefixMemory:
    """Remembers, per chunk of `chunk` tokens of a prompt, the engine that last saw the prompt up to there.

    Args:
        chunk: tokens per remembered step; shorter beginnings have no affinity.
        capacity: chunks remembered; the least recently used are forgotten.
    """

    def __init__(self, chunk: int = 64, capacity: int = 65536) -> None:
        self._chunk, self._capacity = chunk, capacity
        self._engines: OrderedDict[int, Hashable] = OrderedDict()

    def engine(self, prompt: Sequence[int], among: set[Hashable]) -> tuple[Hashable | None, int]:
        """The engine with the longest known beginning of `prompt`, and that beginning's length in tokens."""
        best: tuple[Hashable | None, int] = (None, 0)
        for count, key in enumerate(self._keys(prompt), start=1):
            engine = self._engines.get(key)
            if engine is None:
                break
            if engine in among:
                best = (engine, count * self._chunk)
        return best

    def remember(self, prompt: Sequence[int], engine: Hashable) -> None:
        """`engine` is about to cache the whole of `prompt`."""
        for key in self._keys(prompt):
            self._engines[key] = engine
            self._engines.move_to_end(key)
        while len(self._engines) > self._capacity:
            self._engines.popitem(last=False)

    def _keys(self, prompt: Sequence[int]) -> Iterator[int]:
        key = 0
        for end in range(self._chunk, len(prompt) + 1, self._chunk):
            key = hash((key, tuple(prompt[end - self._chunk : end])))
            yield key
