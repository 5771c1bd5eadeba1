"""How many drafted tokens of each sequence are worth verifying: as many as give the batch most tokens per second.

Goodput = tokens that sequences go on with / seconds (SmartSpec, Liu et al. 2406.14066). Chances fall along a draft, so
that the best n tokens of all drafts together are simply the n likeliest; what is left to find is n.
"""

from collections.abc import Sequence

from stepladder.workers.speculation.step_time import StepTime

GAIN = 1.02  # drafting must promise so much more than not drafting


def best_lengths(
    chances: Sequence[Sequence[float]], tokens: int, context: int, step_time: StepTime, draft_seconds: float = 0.0
) -> list[int]:
    """How many tokens of each draft the next step should verify.

    Args:
        chances: of each draft that its first, first two, ... tokens are accepted.
        tokens, context: of the step without drafts; each of the drafts' sequences has one of these tokens.
        draft_seconds: what drafting costs, if it is done at all.
    """
    ranked = sorted(((chance, i) for i, each in enumerate(chances) for chance in each), key=lambda pair: -pair[0])
    plain = step_time(tokens, context)
    if not ranked or not plain:
        return [len(each) for each in chances]  # nothing is known yet: find out
    best, most, gained = 0, GAIN * len(chances) / plain, float(len(chances))
    for count, (chance, _) in enumerate(ranked, 1):
        gained += chance
        goodput = gained / (step_time(tokens + count, context) + draft_seconds)
        if goodput > most:
            best, most = count, goodput
    lengths = [0] * len(chances)
    for _, index in ranked[:best]:
        lengths[index] += 1
    return lengths
