"""Replay: what is kept and what goes, what is drawn and how often, and who is never learnt from."""

import pytest
import torch

from stepladder.workers.speculation.learning.lessons import Captured, Lesson
from stepladder.workers.speculation.learning.replay import Replay

HIDDEN = 3


def piece(domain: str, request: int, tokens: range | list[int], wrong: tuple[int, ...] = ()) -> Captured:
    """Its states tell request and place."""
    places = torch.arange(len(tokens))
    states = torch.stack((torch.full((len(tokens),), request), places, torch.tensor([*tokens])), 1).bfloat16()
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[list(wrong)] = True
    return Captured(domain, request, Lesson(torch.tensor([*tokens]), states, mask))


def drawn(replay: Replay, places: int) -> list[tuple[int, int]]:
    """Requests and places."""
    lessons, starts = replay.batch(places)
    assert len(starts) == places and lessons.starts.tolist() == starts.tolist()
    assert lessons.states.dtype == torch.float32 and lessons.depth == replay.depth
    for back in range(replay.depth + 1):  # each place comes with those behind it, of the same output
        states = lessons.states[starts + back]
        assert states[:, 2].tolist() == lessons.tokens[starts + back].tolist()
        assert (states[:, 1] - lessons.states[starts][:, 1]).tolist() == [back] * places
        assert states[:, 0].tolist() == lessons.states[starts][:, 0].tolist()
    return [(int(request), int(place)) for request, place, _ in lessons.states[starts].tolist()]


def test_every_place_of_all_domains_is_drawn_alike() -> None:
    replay = Replay(10_000, held_out=100, depth=2, seed=0, newest=1)
    replay.add([piece("small", 1, range(12)), piece("large", 2, range(52)), piece("large", 3, range(52))])
    replay.add([piece("last", 4, range(4))])  # of which the newest half is
    found = drawn(replay, 40_000)
    by_request = {request: sum(r == request for r, _ in found) for request in range(1, 5)}
    third = 20_000 / 3
    assert by_request[1] == pytest.approx(third, rel=0.06)
    assert by_request[2] == pytest.approx(third / 2, rel=0.06) and by_request[3] == pytest.approx(third / 2, rel=0.06)
    assert by_request[4] == pytest.approx(20_000 + third, rel=0.06)
    counts = torch.bincount(torch.tensor([place for request, place in found if request == 1]), minlength=10)
    assert len(counts) == 10, "behind the last one two tokens must follow"
    assert counts.min() > 0.8 * third / 10 and counts.max() < 1.2 * third / 10


def test_half_of_a_batch_is_new() -> None:
    replay = Replay(10_000, held_out=1000, depth=2, seed=0, newest=100)
    replay.add([piece("", request, range(50)) for request in range(1, 101)])
    requests = torch.tensor([request for request, _ in drawn(replay, 2000)])
    assert 1000 <= int((requests > 98).sum()) < 1100


def test_the_oldest_of_the_largest_domain_go() -> None:
    replay = Replay(100, held_out=1000, depth=2, seed=0)
    replay.add([piece("old", request, range(20)) for request in (1, 2)])
    replay.add([piece("new", request, range(20)) for request in range(3, 10)])
    assert replay.domains == {"old": 40, "new": 60} and replay.seen == 180
    assert replay.requests == 5, "two old ones and the newest three"
    assert {request for request, _ in drawn(replay, 2000)} == {1, 2, 7, 8, 9}
    replay.add([piece(f"domain {number}", 10 + number, range(10)) for number in range(60)])
    assert sum(replay.domains.values()) <= 100 and len(replay.domains) <= 10, "names of clients do not pile up"


def test_held_out_requests_are_never_learnt_from() -> None:
    replay = Replay(10_000, held_out=4, depth=2, seed=0)
    replay.add([piece("a", request, range(10)) for request in range(1, 21)])
    replay.add([piece("a", 8, range(5)), piece("a", 24, range(2))])
    assert {request % 4 for request, _ in drawn(replay, 3000)} == {1, 2, 3}
    assert [held.request for held in replay.window(10)] == [4, 12, 16, 20, 8], "24 is too short to be judged"
    assert [[len(lesson.tokens) for lesson in held.lessons] for held in replay.window(2)] == [[10], [10, 5]]
    assert [held.request for held in replay.window(10, depth=9)] == [4, 12, 16, 20, 8]
    assert replay.window(10, depth=10) == replay.window(0) == []


def test_the_window_is_bounded_too() -> None:
    replay = Replay(80, held_out=2, depth=2, seed=0)
    replay.add([piece("a", request, range(10)) for request in range(40)])
    assert [held.request for held in replay.window(100)] == [32, 34, 36, 38]
    replay.add([piece("a", 50, range(100))])
    assert [held.request for held in replay.window(100)] == [50]


def test_errors_only() -> None:
    """A place is one behind which one of the tokens of a draft was drafted wrong."""
    replay = Replay(1000, held_out=100, depth=2, seed=0, errors_only=True)
    replay.add([piece("a", 1, range(10), wrong=(0, 4, 9)), piece("a", 2, range(10)), piece("a", 3, range(10), (8,))])
    assert set(drawn(replay, 400)) == {(1, 2), (1, 3), (1, 7), (3, 6), (3, 7)} and replay.places == 5
    nothing = Replay(1000, held_out=100, depth=2, seed=0)
    nothing.add([piece("a", 1, range(2)), piece("b", 100, range(20))])
    with pytest.raises(ValueError, match="no output of more than 2 tokens"):
        nothing.batch(4)


def test_states_that_are_not_finite_are_left_out() -> None:
    replay = Replay(1000, held_out=100, depth=2, seed=0)
    broken = piece("a", 1, range(10))
    broken.lesson.states[4, 1] = float("nan")
    replay.add([broken, piece("a", 2, range(10))])
    assert {request for request, _ in drawn(replay, 100)} == {2} and replay.seen == 10


def test_to_fit_on_every_place_is_there_once() -> None:
    replay = Replay(1000, held_out=100, depth=2, seed=0)
    replay.add([piece("a", 1, range(6)), piece("a", 2, range(6)), piece("b", 3, range(6))])
    lessons = replay.first(1000)
    places = lessons.states[lessons.starts][:, :2].int().tolist()
    assert sorted(places) == [[request, place] for request in (1, 2, 3) for place in range(4)]
    assert {request for request, _ in lessons.states[replay.first(8).starts][:, :2].int().tolist()} == {2, 3}


def test_the_draft_vocabulary_follows_the_traffic() -> None:
    replay = Replay(1000, held_out=2, depth=2, seed=0)
    replay.add([piece("a", 1, [7] * 30 + [5] * 20 + [9]), piece("a", 2, [8] * 25)])
    assert replay.frequent(3, 12).tolist() == [5, 7, 8], "held-out requests count too: nothing is trained by that"
    assert replay.frequent(6, 12).tolist() == [0, 1, 5, 7, 8, 9], "then those with low ids"
    assert replay.frequent(6, 12, known=torch.tensor([10, 11])).tolist() == [5, 7, 8, 9, 10, 11]
    assert Replay(10, 2, 2, 0).frequent(2, 12, known=torch.tensor([3, 4])).tolist() == [3, 4]
    for _ in range(400):
        replay.add([piece("b", 1, [2] * 600 + [3] * 500)])
    assert replay.frequent(2, 12).tolist() == [2, 3]
    assert float(replay.counts[7]) < 1, "old counts fade"
