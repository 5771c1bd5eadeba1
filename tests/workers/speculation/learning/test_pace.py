"""At which steps candidates are made."""

from collections.abc import Iterable

import pytest

from stepladder.workers.speculation.learning.config import LearnConfig
from stepladder.workers.speculation.learning.pace import Pace


def made(pace: Pace, steps: Iterable[int]) -> list[int]:
    """Those of `steps` after which a candidate was made."""
    found = []
    for step in steps:
        if pace.due(step):
            pace.considered(step)
            found.append(step)
    return found


@pytest.mark.parametrize(
    "most, expected",
    [(40, [2, 6, 14, 30, 62, 102, 142]), (12, [2, 6, 14, 26, 38]), (2, [2, 4, 6]), (1, [1, 2, 3])],
)
def test_candidates_come_early_and_then_at_growing_distances(most: int, expected: list[int]) -> None:
    assert made(Pace(most), range(expected[-1] + 1)) == expected


def test_what_could_not_be_judged_yet_counts_from_when_it_was() -> None:
    """There were too few held-out requests until step 10."""
    pace = Pace(LearnConfig().candidate_every)
    assert all(pace.due(step) for step in range(2, 10))
    assert made(pace, range(10, 39)) == [10, 14, 22, 38]


def test_from_another_head_it_takes_a_whole_gap_again() -> None:
    pace = Pace(40)
    assert made(pace, range(7)) == [2, 6]
    pace.begun(13)
    assert not pace.due(20) and made(pace, range(14, 40)) == [21, 37]
