"""How many drafted tokens of each sequence are worth verifying: as many as give the batch most tokens per second.

Goodput = tokens that sequences go on with / seconds (SmartSpec, Liu et al. 2406.14066). Chances fall along a draft, so
that the best n tokens of all drafts together are simply the n likeliest; what is left to find is n.
"""

from collections.abc import Sequence
from typing import NamedTuple

from stepladder.workers.speculation.step_time import StepTime

GAIN = 1.02  # drafting must promise so much more than not drafting


class Choice(NamedTuple):
    """lengths: tokens of each draft that are worth verifying. gain: expected tokens per second over those of a step
    without drafts; what drafting itself takes is spent by then, and not counted."""

    lengths: list[int]
    gain: float


def best_lengths(chances: Sequence[Sequence[float]], tokens: int, context: int, step_time: StepTime) -> Choice:
    """How many tokens of each draft the next step should verify.

    Args:
        chances: of each draft that its first, first two, ... tokens are accepted.
        tokens, context: of the step without drafts; each of the drafts' sequences has one of these tokens.
    """
    ranked = sorted(((chance, i) for i, each in enumerate(chances) for chance in each), key=lambda pair: -pair[0])
    plain = step_time(tokens, context)
    if not ranked or not plain:
        return Choice([len(each) for each in chances], 1.0)  # nothing is known yet: find out
    rate = len(chances) / plain
    best, most, gained = 0, GAIN * rate, float(len(chances))
    for count, (chance, _) in enumerate(ranked, 1):
        gained += chance
        goodput = gained / step_time(tokens + count, context)
        if goodput > most:
            best, most = count, goodput
    lengths = [0] * len(chances)
    for _, index in ranked[:best]:
        lengths[index] += 1
    return Choice(lengths, most / rate if best else 1.0)


def outcome(
    step_time: StepTime, tokens: int, context: int, sequences: int, drafted: int, drawn: int
) -> tuple[float, float]:
    """Seconds that steps without drafts would have taken for what a step has given, and those of the step itself, in
    times that are known of such steps: a sequence that goes on with three tokens saves two steps of the same company.

    Args:
        tokens, context: of the step, as `StepTime` takes them. sequences: that drew. drafted: tokens of those that were
            drafts. drawn: tokens that they went on with.
    """
    plain = step_time(tokens - drafted, context)
    if sequences:
        plain += (drawn / sequences - 1) * step_time(sequences, context)
    return plain, step_time(tokens, context)
