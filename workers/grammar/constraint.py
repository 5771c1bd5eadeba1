"""What may follow in one sequence, by a compiled grammar: a state on the host that knows every token drawn so far."""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

Bits = NDArray[np.int32]


def words(vocab_size: int) -> int:
    """32-bit words of a row of a mask: a bit for each token, and one more that stands for the end."""
    return vocab_size // 32 + 1


class GrammarConstraint:
    """See `core.Constraint`.

    The matcher has an end of its own, the id behind the vocabulary: a grammar is done or not, whatever tokens the model
    and the request end a text with.

    Args:
        matcher: at the beginning of the text; nobody else uses it.
        vocab_size: of the model.
        ends: tokens that may end the text where the grammar is done.
        last_ends: those that may where nothing else can follow. Not empty.

    Attributes:
        ended: the last token ended the text; it is no part of it.
        error: why the grammar cannot go on; None while it can.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: Sequence[int], last_ends: Sequence[int]) -> None:
        assert last_ends, "a text that nothing ends has no end"
        self._matcher, self._vocab_size, self._last_ends = matcher, vocab_size, frozenset(last_ends)
        self._ends_bits, self._last_bits = (_bits(tokens, vocab_size) for tokens in (ends, last_ends))
        self.ended = False
        self.error: str | None = None

    def mask_rows(self, mask: Bits, unending: int = 0, drafts: Sequence[int] = ()) -> None:
        """Fill rows of a mask [1 + drafts, words(vocab_size)], a bit per token, 1 where it may follow: the first for
        the next token, each other for the one behind a drafted token. Behind a draft that may not follow, rows are left
        as they are: it will not be accepted. The state stays as it is.

        Args:
            unending: in so many rows no end is allowed, unless nothing else can follow.
        """
        taken = 0
        for index, row in enumerate(mask):
            self._fill(row, index < unending)
            if index < len(drafts):
                if not self._matcher.validate_tokens([drafts[index]]):
                    break
                self._matcher.consume_token(drafts[index])
                taken += 1
        self._matcher.rollback(taken)
        self._note_error()

    def advance(self, token: int) -> None:
        """The sequence goes on with this token."""
        if self.error or self.ended:
            return
        if self._matcher.validate_tokens([token]):
            self._matcher.consume_token(token)
        elif token in self._last_ends and self._matcher.is_accepting():
            self.ended = True
        else:
            self.error = f"structured_outputs cannot be kept: the token {token} cannot follow"
        self._note_error()

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        assert self.error is None
        if count and self.ended:
            self.ended, count = False, count - 1
        self._matcher.rollback(count)

    def _fill(self, row: Bits, unending: bool) -> None:
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self.error or self._matcher.is_error():
            row[:] = self._last_bits
            return
        done = _take_bit(row, self._vocab_size)
        if unending:
            without = row & ~self._ends_bits
            row[:] = without if without.any() else row
        elif done:
            row |= self._ends_bits
        if not row.any():
            row[:] = self._last_bits

    def _note_error(self) -> None:
        if self.error is None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            self.error = f"structured_outputs cannot be kept any longer: {reason}"


def _bits(tokens: Sequence[int], vocab_size: int) -> Bits:
    row = np.zeros(words(vocab_size) * 32, dtype=np.uint8)
    row[list(tokens)] = 1
    return np.packbits(row, bitorder="little").view(np.int32)


def _take_bit(row: Bits, index: int) -> bool:
    """Whether this bit is set; then it no longer is."""
    word, bit = row.view(np.uint32)[index // 32 :], np.uint32(1 << index % 32)
    found = bool(word[0] & bit)
    word[0] &= ~bit
    return found
