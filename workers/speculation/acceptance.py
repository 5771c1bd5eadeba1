"""How likely a drafted token is to be accepted, learned from those that were reached.

A token behind a rejected one tells nothing, so that a rate is accepted / reached, never accepted / drafted. A drafter's
own confidence is calibrated (what share of the tokens that it was so sure of was right?), for all requests together;
how a single request deviates from that is one factor.
"""

from dataclasses import dataclass, field

BINS = 10  # of confidence
KEPT = 0.998  # of what is known, for each token that is reached
PRIOR = 4.0  # tokens that confidence itself counts for
OWN_PRIOR = 8.0  # tokens that "like all others" counts for, in a request


@dataclass
class _Rate:
    reached: float = 0.0
    accepted: float = 0.0

    def add(self, accepted: bool) -> None:
        self.reached = self.reached * KEPT + 1
        self.accepted = self.accepted * KEPT + accepted


@dataclass
class _Own:
    """Of one request: tokens accepted, and how many one would have expected."""

    accepted: float = 0.0
    expected: float = 0.0


@dataclass
class Acceptance:
    """Attributes: positions, a rate for each place in a draft, the first one first."""

    positions: list[_Rate] = field(default_factory=list)
    _bins: list[_Rate] = field(default_factory=lambda: [_Rate() for _ in range(BINS)])
    _own: dict[str, _Own] = field(default_factory=dict)

    def observe(self, request_id: str, confidence: list[float], accepted: int) -> None:
        """Of a draft with these confidences so many tokens were accepted."""
        own = self._own.setdefault(request_id, _Own())
        for place, sure in enumerate(confidence[: accepted + 1]):
            right = place < accepted
            own.expected += self._calibrated(sure)
            own.accepted += right
            while len(self.positions) <= place:
                self.positions.append(_Rate())
            self.positions[place].add(right)
            self._bins[_bin(sure)].add(right)

    def forget(self, request_id: str) -> None:
        self._own.pop(request_id, None)

    def of(self, request_id: str, confidence: list[float]) -> list[float]:
        """Chances that the first, the first two, ... tokens of a draft are accepted."""
        own, chance, chances = self._own.get(request_id, _Own()), 1.0, []
        factor = (own.accepted + OWN_PRIOR) / (own.expected + OWN_PRIOR)
        for sure in confidence:
            chance *= min(1.0, factor * self._calibrated(sure))
            chances.append(chance)
        return chances

    def _calibrated(self, confidence: float) -> float:
        rate = self._bins[_bin(confidence)]
        return (rate.accepted + PRIOR * confidence) / (rate.reached + PRIOR)


def _bin(confidence: float) -> int:
    return min(BINS - 1, int(confidence * BINS))
