"""Control messages: what arrives is what was sent, from many at once, and a loss is noticed for itself."""

import queue
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from stepladder.parallel.afd.control import MAX_MICRO_BATCHES, Announcement, Line, Opening
from stepladder.parallel.afd.edges import EdgeLost
from stepladder.parallel.afd.pool_link import Resume

COUNTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=MAX_MICRO_BATCHES).map(tuple)


@given(COUNTS, st.none() | st.builds(Resume, st.integers(0, 500), st.integers(0, 500)))
def test_announcements_as_words(tokens: tuple[int, ...], resume: Resume | None) -> None:
    for announcement in (Announcement(tokens, resume), Announcement(), Announcement(leaves=True)):
        assert Announcement.decode(announcement.encode()) == announcement
        assert len(announcement.encode()) == len(Opening(1, 2, 3, 4).encode())


def lines(count: int) -> list[tuple[Line, Line]]:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    def end(number: int, end: int) -> Line:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        return Line(store, str(number), end, "127.0.0.1", timedelta(seconds=20))

    with ThreadPoolExecutor(2 * count) as pool:
        futures = [[pool.submit(end, number, side) for side in (0, 1)] for number in range(count)]
        return [(a.result(), f.result()) for a, f in futures]


def test_steps_are_announced_and_opened_while_others_are_silent() -> None:
    pairs, events = lines(2), queue.Queue[tuple[int, Announcement | None]]()
    for number, (_, f) in enumerate(pairs):
        f.listen(number, events)
    a, f = pairs[1]
    for step in range(20):
        a.announce(Announcement((step, 1)))
        assert events.get(timeout=20) == (1, Announcement((step, 1)))
        f.open(Opening(7, step, 2, 1000 + step))
        assert a.opening() == Opening(7, step, 2, 1000 + step)
    assert events.empty()


def test_who_leaves_is_gone_and_nobody_else() -> None:
    pairs, events = lines(2), queue.Queue[tuple[int, Announcement | None]]()
    for number, (_, f) in enumerate(pairs):
        f.listen(number, events)
    pairs[0][0].announce(Announcement(leaves=True))
    assert events.get(timeout=20) == (0, None)
    pairs[1][0].announce(Announcement((5,)))
    assert events.get(timeout=20) == (1, Announcement((5,)))


def test_a_peer_that_goes_away_is_lost_at_once() -> None:
    pairs = lines(1)
    a, _ = pairs.pop()
    del _
    with pytest.raises(EdgeLost, match="control line 0"):
        a.opening()


def test_a_peer_that_does_not_come_is_not_waited_for() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with pytest.raises(RuntimeError):
        Line(store, "0", 0, "127.0.0.1", timedelta(seconds=0.3))


@pytest.mark.parametrize("waits", ["opening", "announce"])
def test_who_waits_for_a_silent_peer_is_freed_by_disconnecting(waits: str) -> None:
    """F has never listened: its end is there, and answers nothing."""
    pairs = lines(1)
    a, f = pairs.pop()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(a.opening if waits == "opening" else lambda: a.announce(Announcement((3,))))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        a.disconnect()
        with pytest.raises(EdgeLost, match="control line 0"):
            waiting.result(timeout=10)
    with pytest.raises(EdgeLost, match="control line 0"):
        f.opening()


def test_who_leaves_does_not_wait_for_a_silent_peer() -> None:
    a, _f = lines(1).pop()
    with pytest.raises(EdgeLost):
        a.announce(Announcement(leaves=True))
