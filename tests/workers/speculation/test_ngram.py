"""Prompt lookup."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.workers.speculation.drafters.ngram import NGram
from tests.workers.speculation.streams import sequence, serve


@pytest.mark.parametrize(
    ("prompt", "output", "options", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [], {}, [3, 4, 5]),
        ([1, 2, 3, 4, 5], [6, 1, 2], {}, [3, 4, 5]),
        ([8, 1, 2, 3, 9, 1, 2, 4, 1, 2], [], {}, [4, 1, 2]),  # the latest
        ([8, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2], [], {}, [3, 9, 1]),  # the longest before the latest
        ([8, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2], [], {"max_n": 2}, [4, 8, 1]),
        ([8, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2], [], {"min_n": 4}, []),
        ([1, 2, 3, 4], [], {}, []),
        ([5], [], {}, []),
        ([7, 5, 5, 5], [], {}, [5, 5, 5]),
    ],
)
def test_proposals(prompt: list[int], output: list[int], options: dict[str, int], expected: list[int]) -> None:
    drafter = NGram(threshold=0.0, **options)
    assert drafter.propose([sequence(prompt, output)], [3])[0].tokens == expected


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 4))
@settings(deadline=None)
def test_it_is_the_latest_longest_match(text: list[int], min_n: int, more: int) -> None:
    def ends(n: int) -> list[int]:
        return [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]

    lengths = [n for n in range(min_n, min(min_n + more, len(text)) + 1) if ends(n)]
    expected = text[ends(lengths[-1])[-1] :] if lengths else []
    drafter = NGram(min_n, min_n + more, threshold=0.0, places=1000)
    assert drafter.propose([sequence(text)], [5])[0].tokens == (expected * 5)[:5]


def test_longer_matches_are_trusted_more() -> None:
    """Here one token in common says little, and eight say all; it is learnt from what is not drafted as well."""
    drafter = NGram(threshold=0.5)
    new = iter(range(100, 1000))
    text = [token for _ in range(40) for token in (next(new), 0, next(new), 0, next(new), 0, next(new), *range(1, 25))]
    serve(drafter, sequence(text[:1]), text)
    rates = drafter.calibration.rates
    assert rates[1] < 0.4 < 0.8 < rates[8]
    [unsure] = drafter.propose([sequence([5, 0, 9, 9, 0], name="b")], [4])
    [sure] = drafter.propose([sequence([*range(20), *range(9)], name="c")], [4])
    assert unsure.tokens == [] and sure.tokens == [9, 10, 11, 12]
    assert sure.confidence == [rates[8]] * 4
