"""The registry of drafters: what `speculate=...` may name."""

from collections.abc import Callable

from stepladder.workers.speculation.drafter import Drafter
from stepladder.workers.speculation.drafters.ngram import NGram
from stepladder.workers.speculation.drafters.recycling import Recycling
from stepladder.workers.speculation.drafters.suffix import Suffix

Make = Callable[[float, int, int], Drafter]
"""From the confidence where it stops, the tokens that it may remember, and the size of the vocabulary."""

KINDS: dict[str, Make] = {
    "ngram": lambda threshold, memory, vocabulary: NGram(threshold=threshold),
    "suffix": lambda threshold, memory, vocabulary: Suffix(memory, threshold),
    "recycling": lambda threshold, memory, vocabulary: Recycling(vocabulary, threshold=threshold),
}
