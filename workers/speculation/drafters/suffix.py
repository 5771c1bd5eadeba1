"""Suffix decoding: a sequence goes on as texts like it have, its own and those of other requests."""

from math import log

from stepladder.kernels.host_noise import gumbel_of
from stepladder.workers.core import Sequence
from stepladder.workers.params import check
from stepladder.workers.speculation.drafters.lookup import Guess, Lookup, State
from stepladder.workers.speculation.drafters.occurrences import END, Match, Occurrences

__all__ = ["Suffix"]

SIZES = (4, 2, 1)
PIECE = 128  # tokens of an output that come into the common memory at once, while it is being written
AGREEING, SHARES = 3, 5  # how finely the kinds of guesses are told apart
WEIGHT = 2  # of a place, for each token that it matches further back
DRAWN, SHARPER = 4, 2  # tokens that a draw is among, and how much more than their weights say it keeps to the likeliest


class Suffix(Lookup):
    """Places where a sequence's last tokens stood before vote on the next one, those that match further back with more
    weight; those that named the token that was chosen vote on the one behind it. Places are found in the sequence's own
    prompt and output, and in a memory of the outputs of all requests that may be learnt from.

    At a temperature the votes are drawn from, with the noise that the target's own token will be drawn with: where the
    two hold the same tokens likely, it picks the same one (Daliri et al. 2408.07978).

    Confidence is learnt by how far back the matches reach, the share of the votes, and how many places agree (Oliaro et
    al. 2411.04975 take the share itself, in a tree with counts).

    Args:
        memory: tokens of outputs that are remembered, at most 60 bytes each; the oldest are forgotten first. 0: no
            request learns from others.
        threshold: a draft ends where it would be right with less than this probability.
        depth: how far back places are compared.
        places: how many vote from either source, the latest.
    """

    def __init__(self, memory: int = 1 << 18, threshold: float = 0.05, depth: int = 16, places: int = 32) -> None:
        check(memory >= 0, f"a suffix drafter remembers {memory} tokens; it must be 0 or more")
        check(depth >= max(SIZES), f"a suffix drafter compares {depth} tokens; it must be at least {max(SIZES)}")
        check(places >= 1, f"a suffix drafter asks {places} places; it must be at least 1")
        kinds = [(n, a, s) for n in range(depth + 1) for a in range(AGREEING) for s in range(SHARES)]
        super().__init__(threshold, [_estimate(n, a + 1, (s + 1) / SHARES) for n, a, s in kinds])
        self.depth, self.places = depth, places
        self.memory = Occurrences(SIZES, depth, memory) if memory else None
        self._remembered: dict[str, int] = {}  # by request: up to where its output is in the memory

    def index(self) -> Occurrences:
        return Occurrences(SIZES, self.depth)

    def guess(self, state: State, context: list[int], most: int, ahead: int = 0) -> list[Guess]:
        guesses: list[Guess] = []
        matches = state.own.find(context, most, self.places)
        if self.memory:
            matches += self.memory.find(context, most, self.places)
        while matches and len(guesses) < most:
            at = len(guesses)
            token, agreeing, share = _vote(matches, at, state.seed, state.known + ahead + at)
            if token == END:
                break
            matches = agreeing
            reach = max(match.length for match in matches) + len(guesses)
            guesses.append(Guess(token, self._kind(reach, len(matches), share)))
        return guesses

    def follow(self, sequence: Sequence) -> State:
        state = super().follow(sequence)
        self._remember(sequence, PIECE)
        return state

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        self._remember(sequence, 1)
        self._remembered.pop(sequence.request.id, None)

    def _remember(self, sequence: Sequence, least: int) -> None:
        """Take what is new of an output into the memory, if it is at least so much and may be kept."""
        stop = len(sequence.tokens) - sequence.is_drawing
        start = self._remembered.get(sequence.request.id, len(sequence.request.prompt))
        if self.memory and sequence.request.learn and stop - start >= least:
            first = max(0, start - self.depth)
            self.memory.add_document(sequence.tokens[first:stop], start - first)
            self._remembered[sequence.request.id] = stop

    def _kind(self, reach: int, agreeing: int, share: float) -> int:
        nth = min(reach, self.depth) * AGREEING + min(agreeing, AGREEING) - 1
        return nth * SHARES + max(0, round(share * SHARES) - 1)


def _vote(matches: list[Match], at: int, seed: int | None, position: int) -> tuple[int, list[Match], float]:
    """The token at `at` behind these places that most weight is for, or that is drawn with the noise that the target
    will draw with; who named it; and the largest share of the weight, which says more of a draw than its own."""
    weights: dict[int, int] = {}
    for length, following in matches:
        token = following[at] if at < len(following) else END
        weights[token] = weights.get(token, 0) + WEIGHT**length
    token = likeliest = max(weights, key=weights.__getitem__)
    if seed is not None and len(weights) > 1 and likeliest != END:
        few = sorted((token for token in weights if token != END), key=weights.__getitem__, reverse=True)[:DRAWN]
        noise = gumbel_of(seed, position, few)
        token = max(zip(few, noise, strict=True), key=lambda one: SHARPER * log(weights[one[0]]) + one[1])[0]
    agreeing = [match for match in matches if at < len(match.following) and match.following[at] == token]
    return token, agreeing, weights[likeliest] / sum(weights.values())


def _estimate(reach: int, agreeing: int, share: float) -> float:
    """Confidence before anything has been learnt: one place that matches in two tokens is as good as a coin."""
    return share * reach * agreeing / (reach * agreeing + 2)
