"""How often guesses of a kind have been right lately."""

from collections.abc import Sequence as Seq

__all__ = ["Calibration"]

MEMORY = 256  # guesses after which an old one counts 1 / e


class Calibration:
    """A rate per kind of guess, which begins with an estimate and follows what is learnt.

    Args:
        estimates: the rates to begin with. prior: how many guesses they count as much as.
    """

    def __init__(self, estimates: Seq[float], prior: int = 8) -> None:
        self.rates = list(estimates)
        self._seen = [prior] * len(self.rates)

    def learn(self, kind: int, right: bool) -> None:
        """A guess of this kind was right, or was not."""
        seen = self._seen[kind] = min(self._seen[kind] + 1, MEMORY)
        self.rates[kind] += (right - self.rates[kind]) / seen
