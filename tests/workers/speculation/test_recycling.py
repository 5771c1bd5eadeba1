"""Token Recycling."""

import pytest

from stepladder.workers.speculation.drafter import Verified
from stepladder.workers.speculation.drafters.recycling import Recycling
from tests.workers.speculation.streams import sequence


def test_a_chain_of_what_was_likeliest() -> None:
    drafter = Recycling(8, threshold=0.0)
    running = sequence([5, 1], [2])
    drafter.observe([Verified(running, [], [2], [[3]])])  # behind 1 the model held 3 likeliest, though 2 was drawn
    assert drafter.propose([running, sequence([1], name="b")], [4, 4])[1].tokens == [3]
    running.tokens += [6, 4]
    drafter.observe([Verified(running, [6, 7, 0], [6, 4], [[6], [4], [1], [7]])])
    drafts = drafter.propose([sequence([2], name="b"), sequence([7], name="c"), sequence([0], name="d")], [3, 3, 1])
    assert [draft.tokens for draft in drafts] == [[6, 4], [1, 3], [7]], "rows behind rejected tokens count as well"


def test_what_must_not_be_learnt_from_changes_nothing() -> None:
    drafter = Recycling(8, threshold=0.0)
    drafter.observe([Verified(sequence([1], [2], learn=False), [], [2], [[3]])])
    assert drafter.propose([sequence([1])], [1])[0].tokens == []
    drafter.observe([Verified(sequence([1], [2]), [], [2], [[3]])])
    drafter.observe([Verified(sequence([1], [2], learn=False), [], [2], [[4]])])
    assert drafter.propose([sequence([1])], [1])[0].tokens == [3]
    assert drafter.calibration.rates[1] == Recycling(2).calibration.rates[1]


def test_the_newest_replaces_what_was_known() -> None:
    drafter = Recycling(4, threshold=0.0)
    for likeliest in (2, 3):
        drafter.observe([Verified(sequence([1, 0]), [], [0], [[likeliest, 1]])])
    assert drafter.propose([sequence([1])], [1])[0].tokens == [3]


def test_it_learns_behind_which_tokens_the_next_is_foreseen() -> None:
    drafter = Recycling(8, threshold=0.3)
    for number in range(20):
        drafter.observe([Verified(sequence([1, 2]), [], [2], [[2]])])
        drafter.observe([Verified(sequence([3, number % 8]), [], [number % 8], [[4]])])
    sure, unsure = drafter.propose([sequence([1]), sequence([3], name="b")], [1, 1])
    assert sure.tokens == [2] and sure.confidence[0] > 0.8 and unsure.tokens == []
    assert drafter.calibration.rates[3] == pytest.approx(2 / 19, abs=0.1)


def test_ended_by_a_stop_in_a_draft() -> None:
    """Fewer tokens than were accepted; the rows behind its end are the model's all the same."""
    drafter = Recycling(8, threshold=0.0)
    drafter.observe([Verified(sequence([1], [2]), [2, 3], [2], [[2], [3], [5]])])
    assert drafter.propose([sequence([1])], [3])[0].tokens == [2, 3, 5]
