"""Whether drafting pays for so many sequences; while it does not it is left alone, and tried ever more rarely."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

REST = 32  # steps without drafts after drafting has not paid; twice as many each time, up to the longest
LONGEST_REST = 1024
KEPT = 0.985  # of what drafting has given and cost, at each step that asks for drafts, for each of its sequences
RECENT = 15  # steps whose median is what drafting takes: a hiccup of the machine is none of it
JUDGED, STEPS = 64, 8  # sequences in such steps, and steps, before drafting is given up
CLEARLY = -0.25  # or steps alone, if they have cost so much of a step each
COLD = 2  # first ones after a rest, which find nothing in the caches and are not counted


@dataclass
class _Company:
    """So many sequences, up to twice as many.

    rest: steps without drafts that are left. steps: that asked for drafts since the last rest, sequences in these;
    worth: what each was worth lately, in steps without drafts. seconds: that drafting took lately.
    """

    rest: int = 0
    next_rest: int = REST
    steps: int = -COLD
    sequences: int = 0
    worth: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


@dataclass
class Payoff:
    """By how many sequences decode together, in powers of two: what does not pay for many may pay for few."""

    _companies: dict[int, _Company] = field(default_factory=dict)
    _now: _Company = field(default_factory=_Company)

    def forget(self) -> None:
        """Nothing is known any more."""
        self._companies, self._now = {}, _Company()

    @property
    def resting(self) -> int:
        """Steps without drafts that are left, for as many sequences as were asked for last."""
        return self._now.rest

    def asks(self, decoding: int) -> bool:
        """Whether the next step should have drafts."""
        now = self._now = self._companies.setdefault(decoding.bit_length(), _Company())
        if not now.rest:
            return True
        now.rest -= 1
        return False

    def judge(self, gain: float, seconds: float, plain: float, sequences: int) -> None:
        """Of a step that asked for drafts.

        Args:
            gain: tokens per second of its time over those of steps without drafts, as it came. seconds: that it took to
                make drafts and to learn from them. plain: of a step without drafts. sequences: that drew.
        """
        now = self._now
        now.steps += 1
        if now.steps <= 0:
            return
        now.sequences += sequences
        now.seconds.append(seconds)
        worth = gain - 1 - median(now.seconds) / plain
        now.worth += (worth - now.worth) * max(1 - KEPT**sequences, sequences / now.sequences)
        if now.steps < STEPS or (now.sequences < JUDGED and now.worth > CLEARLY):
            return
        if now.worth > 0:
            now.next_rest = REST
            return
        now.rest, now.next_rest = now.next_rest, min(2 * now.next_rest, LONGEST_REST)
        now.steps, now.sequences, now.worth = -COLD, 0, 0.0
