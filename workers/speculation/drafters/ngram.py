"""Prompt lookup: a sequence goes on as it did when it last said the same."""

from stepladder.workers.params import check
from stepladder.workers.speculation.drafters.lookup import Guess, Lookup, State
from stepladder.workers.speculation.drafters.occurrences import Occurrences

__all__ = ["NGram"]


class NGram(Lookup):
    """What followed the latest place with the longest match (`min_n` to `max_n` tokens) in a sequence's own prompt and
    output. A token's confidence is learnt by how long the match is when it comes to it.

    Args:
        threshold: a draft ends where it would be right with less than this probability.
        places: how many are compared, the latest with the same four tokens, or if there are none with the same `min_n`.
    """

    def __init__(self, min_n: int = 1, max_n: int = 8, threshold: float = 0.05, places: int = 32) -> None:
        check(1 <= min_n <= max_n, f"n-grams from {min_n} to {max_n} tokens; the first is at least 1 and the least")
        check(places >= 1, f"an n-gram drafter compares {places} places; it must be at least 1")
        super().__init__(threshold, [(n + 1) / (n + 3) for n in range(max_n + 1)])
        self.min_n, self.max_n, self.places = min_n, max_n, places

    def index(self) -> Occurrences:
        return Occurrences({self.min_n, min(max(self.min_n, 4), self.max_n)}, self.max_n)

    def guess(self, state: State, context: list[int], most: int, ahead: int = 0) -> list[Guess]:
        matches = state.own.find(context, most, self.places)
        if not matches:
            return []
        best = max(matches, key=lambda match: match.length)
        return [Guess(token, min(best.length + at, self.max_n)) for at, token in enumerate(best.following)]
