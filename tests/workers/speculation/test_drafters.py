"""What every drafter without weights keeps to."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.workers.speculation.drafter import Drafter, Verified
from stepladder.workers.speculation.drafters.ngram import NGram
from stepladder.workers.speculation.drafters.recycling import Recycling
from stepladder.workers.speculation.drafters.suffix import Suffix
from tests.workers.speculation.streams import sequence, serve

Make = Callable[[float], Drafter]
MAKERS: dict[str, Make] = {
    "ngram": lambda threshold: NGram(threshold=threshold),
    "suffix": lambda threshold: Suffix(threshold=threshold, memory=256),
    "recycling": lambda threshold: Recycling(16, threshold=threshold),
}
every_drafter = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
LOOP = [1, 2, 3, 4, 5, 6] * 8


def successor(token: int) -> int:
    return token % 6 + 1


@every_drafter
def test_a_text_that_repeats_is_foreseen(make: Make) -> None:
    drafter = make(0.3)
    running = sequence(LOOP[:1])
    first = serve(drafter, running, LOOP, 4, successor)
    drafter.forget(running)
    second = serve(drafter, sequence(LOOP[:7]), LOOP, 4, successor)
    assert first.accepted > 0 and second.accepted == second.drafted > 0
    assert second.steps <= -(-(len(LOOP) - 7) // 5) + 2, "four of five tokens are drafted"


@every_drafter
@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(0, 9), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_no_more_than_asked_for(make: Make, text: list[int], most: int, threshold: float) -> None:
    drafter = make(threshold)
    serve(drafter, sequence(text[:1], name="before"), text, 3, successor)
    drafts = drafter.propose([sequence(text, name=name) for name in "abc"], [most, 0, 1])
    for draft, limit in zip(drafts, (most, 0, 1), strict=True):
        assert len(draft.tokens) == len(draft.confidence) <= limit
        assert all(1 <= token <= 6 for token in draft.tokens)
        product = 1.0
        for confidence in draft.confidence:
            assert 0 <= confidence <= 1
            product *= confidence
        assert product >= threshold, "it stops by itself"


@every_drafter
def test_none_while_the_last_token_is_being_drawn(make: Make) -> None:
    drafter = make(0.0)
    running = sequence(LOOP[:1])
    serve(drafter, running, LOOP, 4, successor)
    running.tokens.append(-1)
    assert drafter.propose([running], [4])[0].tokens == []
    running.tokens[-1] = 1
    drafter.observe([Verified(running, [], [1], [[2]])])
    assert drafter.propose([running], [3])[0].tokens == [2, 3, 4]


@every_drafter
@given(st.lists(st.integers(1, 3), min_size=2, max_size=60), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_step_by_step_is_as_all_at_once(make: Make, text: list[int], draw: random.Random) -> None:
    """Seen from the prompt on, in pieces, or only now, as a replay that has its output with it."""
    steps, once = make(0.0), make(0.0)
    if isinstance(steps, Recycling):
        return  # it knows no texts
    running = sequence(text[:1])
    while len(running.tokens) < len(text):
        steps.propose([running], [draw.randrange(4)])
        came = text[len(running.tokens) :][: draw.randrange(1, 6)]
        running.tokens += came
        if draw.random() < 0.5:
            steps.observe([Verified(running, [], came)])
    replay = sequence(text[:1], text[1:])
    assert steps.propose([running], [6])[0].tokens == once.propose([replay], [6])[0].tokens


@every_drafter
def test_what_is_forgotten_leaves_nothing(make: Make) -> None:
    """Observed once more, by an engine that forgets before it reports, it is not taken up again; its id is free."""
    drafter = make(0.3)
    ended = sequence([9, 8, 7, 9, 8, 7])
    drafter.propose([ended], [4])
    ended.tokens += [9, 8]
    drafter.observe([Verified(ended, [9], [9, 8], [[8], [7]])])
    drafter.forget(ended)
    drafter.observe([Verified(ended, [], [8], [[7]])])
    drafter.forget(sequence([1], name="never seen"))
    assert not getattr(drafter, "states", {}) and not getattr(drafter, "_remembered", {})
    assert drafter.propose([sequence([1, 2, 3])], [4])[0].tokens == []
    assert serve(drafter, sequence(LOOP[:7]), LOOP, 4, successor).accepted > 15


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NGram(threshold=1.5), "threshold is 1.5"),
        (lambda: Recycling(4, threshold=-1), "threshold is -1"),
        (lambda: Recycling(0), "vocabulary of 0"),
        (lambda: NGram(min_n=3, max_n=2), "from 3 to 2"),
        (lambda: NGram(min_n=0), "from 0 to 8"),
        (lambda: NGram(places=0), "0 places"),
        (lambda: Suffix(places=0), "0 places"),
        (lambda: Suffix(memory=-1), "remembers -1"),
        (lambda: Suffix(depth=3), "compares 3"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Drafter], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
