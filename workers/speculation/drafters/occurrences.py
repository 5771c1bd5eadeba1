"""Where a text has said the same before: an index of its n-grams that grows with it, in constant time per token.

Each place of a text is linked with the latest earlier one at which the same n-gram ends, as Lempel and Ziv's coders do.
Following such a chain and comparing backwards finds what a suffix tree would, the latest places first, at a fraction of
its memory; only what lies beyond the links that are followed is missed.
"""

from array import array
from collections import defaultdict
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import NamedTuple

__all__ = ["END", "Match", "Occurrences"]

END = -1  # stands behind each document


class Match(NamedTuple):
    """A place where a context was seen before.

    length: how many of the context's last tokens stand there, counted up to a depth. following: what comes behind
        them, at least one token; behind an END it means nothing.
    """

    length: int
    following: Seq[int]


class _Chains:
    """The places where each n-gram of one size ends, linked from the latest to the earliest.

    heads: of an n-gram, by its hash & mask, the latest place. earlier: of a place, the one before.
    """

    def __init__(self, size: int, capacity: int | None) -> None:
        self.size = size
        self.earlier = array("q")
        self.mask = -1 if capacity is None else (1 << (capacity - 1).bit_length()) - 1
        self.heads: defaultdict[int, int] | array[int] = defaultdict(lambda: END)
        if capacity is not None:
            self.heads = array("q", [END]) * (self.mask + 1)


class Occurrences:
    """The tokens of texts, and where their n-grams stand.

    Args:
        sizes: of the n-grams. The longest that occurs is looked at; of contexts below the shortest nothing is found.
        depth: how far contexts are compared; at least the largest size.
        capacity: of tokens. The oldest are overwritten, so that memory is bounded: 4 bytes per token and 16 to 24 per
            token and size. None: everything is kept.
    """

    def __init__(self, sizes: Collection[int], depth: int, capacity: int | None = None) -> None:
        assert min(sizes) > 0 and depth >= max(sizes) and (capacity is None or capacity > 0)
        self.depth = depth
        self.count = 0  # tokens that were ever added; a token's place is this number before it
        self.tokens = array("i")  # by place % capacity, as in `earlier`
        self._capacity = capacity or 1 << 62
        self._chains = [_Chains(size, capacity) for size in sorted(sizes, reverse=True)]

    def extend(self, text: Seq[int], start: int, stop: int) -> None:
        """Add text[start:stop] behind text[:start], which was added last."""
        for at in range(start, stop):
            place = self.count
            self._store(text[at])
            for chains in self._chains:
                if at + 1 >= chains.size:
                    key = hash(tuple(text[at + 1 - chains.size : at + 1])) & chains.mask
                    chains.earlier[place % self._capacity] = chains.heads[key]
                    chains.heads[key] = place

    def add_document(self, text: Seq[int], context: int) -> None:
        """Add a text by itself. Its first `context` tokens are only there for comparisons."""
        for token in text[:context]:
            self._store(token)
        self.extend(text, context, len(text))
        self._store(END)

    def _store(self, token: int) -> None:
        if self.count < self._capacity:
            self.tokens.append(token)
            for chains in self._chains:
                chains.earlier.append(END)
        else:
            self.tokens[self.count % self._capacity] = token
        self.count += 1

    def find(self, context: Seq[int], most: int, places: int) -> list[Match]:
        """The latest `places` with the longest n-gram that ends `context` and occurred before, latest first; what
        follows there is given up to `most` tokens."""
        for chains in self._chains:
            if chains.size <= len(context) and (matches := self._follow(chains, context, most, places)):
                return matches
        return []

    def _follow(self, chains: _Chains, context: Seq[int], most: int, places: int) -> list[Match]:
        matches: list[Match] = []
        place = chains.heads[hash(tuple(context[-chains.size :])) & chains.mask]
        oldest = self.count - len(self.tokens)
        for _ in range(places + 1):  # the latest may be the context itself
            if place < oldest:
                break
            at = place % self._capacity
            following = self.tokens[at + 1 : at + 1 + most]
            if 0 < len(following) < most and place + 1 + len(following) == self.count:
                following = (following * most)[:most]  # it reaches the present, and goes on with what it has just said
            if following and following[0] != END:
                length = self._common(context, place, oldest)
                if length >= chains.size:  # and not another n-gram with the same hash
                    matches.append(Match(length, following))
            place = chains.earlier[at]
        return matches[:places]

    def _common(self, context: Seq[int], place: int, oldest: int) -> int:
        """How many tokens that end `context` also end at `place`."""
        most = min(self.depth, len(context), place + 1 - oldest)
        for length in range(most):
            if self.tokens[(place - length) % self._capacity] != context[-1 - length]:
                return length
        return most
