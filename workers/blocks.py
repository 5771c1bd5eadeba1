"""The KV block manager: which sequence holds which blocks, and which blocks hold a prefix worth keeping.

A full block is known by the hash of its tokens and of everything before it, so that a prompt with a known beginning
takes those blocks over instead of computing them. Blocks nobody holds keep their content until they are needed for
something else, the longest unused first. Pure host code.
"""

import hashlib
from array import array
from collections import OrderedDict

from stepladder.workers.core import Sequence


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens each.

    Args:
        salt: what besides the tokens decides about keys and values; the model and its residual wiring.
        caching: whether blocks are shared and kept at all.

    Attributes:
        queries, hits: tokens of prompts that were looked up, and that were found; since start.
    """

    def __init__(self, num_blocks: int, block_size: int, salt: str = "", caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self._root = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # longest unused first
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.queries = self.hits = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_own(self, sequence: Sequence) -> int:
        """Blocks that nobody else holds: what would become free without it."""
        return sum(self._holders[block] == 1 for block in sequence.blocks)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more blocks `sequence` needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.blocks))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` room for `num_tokens` tokens; False, and nothing changed, if there are too few blocks."""
        missing = self.missing(sequence, num_tokens)
        if missing > self.num_free:
            return False
        sequence.blocks.extend(self._take_free() for _ in range(missing))
        return True

    def reuse(self, sequence: Sequence) -> None:
        """Begin `sequence`, which holds nothing yet, with the longest cached beginning of its tokens.

        At least one token is left to be computed, since its logits are wanted.
        """
        assert not sequence.blocks and not sequence.num_computed
        if not self.caching:
            return
        whole = (len(sequence.tokens) - 1) // self.block_size
        for index in range(whole):
            block = self._block_of.get(self._key(sequence, index))
            if block is None:
                break
            self._hold(block)
            sequence.blocks.append(block)
        sequence.num_computed = len(sequence.blocks) * self.block_size

    def count_lookup(self, sequence: Sequence) -> None:
        """Note what `reuse` found, once the sequence really begins."""
        sequence.num_cached = sequence.num_computed
        self.queries += len(sequence.tokens)
        self.hits += sequence.num_cached

    def keep(self, sequence: Sequence, start: int, stop: int) -> None:
        """Make the blocks known that became full when its tokens from `start` to `stop` were computed."""
        if not self.caching:
            return
        for index in range(start // self.block_size, stop // self.block_size):
            block, key = sequence.blocks[index], self._key(sequence, index)
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key

    def trim(self, sequence: Sequence, num_tokens: int) -> None:
        """Take back the blocks behind its first `num_tokens` tokens: those drafted for them were not accepted."""
        while len(sequence.blocks) * self.block_size >= num_tokens + self.block_size:
            block = sequence.blocks.pop()
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def forget(self) -> None:
        """Know no content any more; whoever holds blocks keeps them."""
        self._key_of.clear()
        self._block_of.clear()

    def release(self, sequence: Sequence) -> None:
        """Take back everything `sequence` holds; its last blocks are the first to be used for something else."""
        for block in reversed(sequence.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
        sequence.blocks.clear()

    def check_integrity(self, holders: list[Sequence]) -> None:
        """Every block is free or held by exactly the sequences that list it; what is known is known both ways."""
        held = [0] * self.num_blocks
        for sequence in holders:
            for block in sequence.blocks:
                held[block] += 1
        assert held == self._holders, "a KV block is lost or counted wrongly"
        assert set(self._free) == {b for b, count in enumerate(held) if not count}, (
            "a KV block is neither free nor held"
        )
        assert {block: key for key, block in self._block_of.items()} == self._key_of

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        if key := self._key_of.pop(block, None):
            del self._block_of[key]
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Key of the sequence's block `index`; kept in the sequence, since each one needs all before it."""
        keys, size = sequence.block_keys, self.block_size
        while len(keys) <= index:
            at = len(keys) * size
            tokens = array("q", sequence.tokens[at : at + size]).tobytes()
            keys.append(hashlib.blake2b(tokens, digest_size=16, key=keys[-1] if keys else self._root).digest())
        return keys[index]
