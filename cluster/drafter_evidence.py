"""What live traffic says of a drafter's versions: how often what they foresaw came, and whether one is worse.

A guess counts where its place was reached, drafted or not, so that neither the length of drafts nor the load changes
the share that is right. Guesses of one request are right or wrong together, so that they count for less than as many
coins. How much less is seen from batches of them: that is the spread (the dispersion of a quasi-binomial model).
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["ENOUGH", "LATELY", "LEAST", "RECENT", "Counts", "Evidence", "Recent", "is_worse"]

KEPT = 12_000  # guesses that are known of a version, the newest ones; there is about one per token
RECENT = 3000  # of these, what says what acceptance was just before it was replaced: traffic changes
LATELY = 500  # guesses, of whatever version: what a curve over time is drawn from
BATCH = 96  # guesses: of several requests, or of one
LEAST = 1000  # guesses without which nothing is said
ENOUGH = 20_000  # guesses of a version that has not been found worse by then
MARGIN = 0.03  # of acceptance; a difference below is nothing, since the gate has found the newer one better
SURE = 2.5  # standard errors: it is looked at again and again
SPREAD, SPREAD_BATCHES = 6.0, 8  # what is supposed before there are batches, and how many it counts for


class Counts(NamedTuple):
    """Of one version. guesses: what it foresaw of tokens that were reached. right: those that came. drafts, accepted:
    drafts verified, and tokens of theirs that were accepted, whoever had foreseen them."""

    guesses: int = 0
    right: int = 0
    drafts: int = 0
    accepted: int = 0


class Evidence(NamedTuple):
    """Of one version, lately. guesses: how many. rate: the share that was right. spread: how many guesses say as much
    as one coin."""

    guesses: float
    rate: float
    spread: float

    @property
    def error(self) -> float:
        """The standard error of `rate`."""
        p = (self.rate * self.guesses + 1) / (self.guesses + 2)
        return math.sqrt(self.spread * p * (1 - p) / max(self.guesses, 1))


class Recent:
    """The newest guesses of one version. Attributes: total, all that there ever were."""

    def __init__(self) -> None:
        self.total = 0
        self._batches: deque[Counts] = deque()
        self._open = Counts()

    def add(self, counts: Counts) -> None:
        self.total += counts.guesses
        self._open = _sum((self._open, counts))
        if self._open.guesses >= BATCH:
            self._batches.append(self._open)
            self._open = Counts()
        while len(self._batches) > 1 and _sum(self._batches).guesses - self._batches[0].guesses >= KEPT:
            self._batches.popleft()

    def evidence(self, newest: int = KEPT) -> Evidence:
        """Of so many guesses, about. A batch may be larger: what an engine has counted before a controller began."""
        batches, whole = self._newest(newest)
        rate = whole.right / max(whole.guesses, 1)
        return Evidence(min(whole.guesses, newest), rate, _spread(batches, rate))

    def accepted_length(self, newest: int = RECENT) -> float | None:
        """Tokens that a step with a draft gave lately, with its own one; None without drafts."""
        _, whole = self._newest(newest)
        return 1 + whole.accepted / whole.drafts if whole.drafts else None

    def _newest(self, guesses: int) -> tuple[list[Counts], Counts]:
        """Batches of at least so many, as far as there are, and what they and the open one come to."""
        batches, whole = list[Counts](), self._open
        for batch in reversed(self._batches):
            if whole.guesses >= guesses:
                break
            batches.append(batch)
            whole = _sum((whole, batch))
        return batches, whole


def is_worse(new: Evidence, old: Evidence) -> bool:
    """Whether the acceptance of one is below that of the other by more than the margin, and not by chance."""
    if min(new.guesses, old.guesses) < LEAST:
        return False
    return old.rate - new.rate - MARGIN > SURE * math.hypot(new.error, old.error)


def _sum(several: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*several, strict=True)))


def _spread(batches: Sequence[Counts], rate: float) -> float:
    """How much more batches differ than so many coins would: Pearson's chi square, over its degrees of freedom."""
    if not 0 < rate < 1:
        return SPREAD
    squares = sum((one.right - rate * one.guesses) ** 2 / one.guesses for one in batches) / (rate * (1 - rate))
    return max(1.0, (squares + SPREAD * SPREAD_BATCHES) / (max(len(batches) - 1, 0) + SPREAD_BATCHES))
