"""The KV block manager: which sequence holds which blocks. Pure host code."""

from collections import deque

from workers.core import Sequence


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more blocks `sequence` needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.blocks))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` room for `num_tokens` tokens; False, and nothing changed, if there are too few blocks."""
        missing = self.missing(sequence, num_tokens)
        if missing > self.num_free:
            return False
        sequence.blocks.extend(self._free.popleft() for _ in range(missing))
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back everything `sequence` holds."""
        self._free.extend(sequence.blocks)
        sequence.blocks.clear()

    def check_integrity(self, holders: list[Sequence]) -> None:
        """Every block is free or held by exactly one sequence."""
        held = [block for sequence in holders for block in sequence.blocks]
        assert sorted([*held, *self._free]) == list(range(self.num_blocks)), "a KV block is lost or held twice"
