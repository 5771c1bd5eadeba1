"""The ring: bounded, in turns, never waiting."""

import logging
import random
import threading
from collections import Counter

import pytest

from stepladder.workers.figures import declared
from stepladder.workers.speculation.learning.lessons import Captured
from stepladder.workers.speculation.learning.ring import MOST_DOMAINS, OVERHEAD, Ring, RingStats
from tests.workers.speculation.learning.captures import lesson

SIZE = 10 * (8 + 1 + 4 * 2) + OVERHEAD  # of a piece of 10 tokens


def piece(domain: str, request: int, tokens: int = 10) -> Captured:
    return Captured(domain, request, lesson(tokens))


def filled(max_bytes: int, *several: tuple[str, int]) -> Ring:
    ring = Ring(max_bytes)
    for domain, request in several:
        ring.put(piece(domain, request))
    return ring


def names(taken: list[Captured]) -> str:
    return " ".join(f"{one.domain}{one.request}" for one in taken)


def test_domains_take_turns_oldest_first() -> None:
    ring = filled(1 << 20, ("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("a", 6))
    assert ring.stats == RingStats(60, 0, 6 * SIZE)
    assert names(ring.take(29)) == "a1 b4"
    assert names(ring.take(20, 2 * SIZE)) == "c5 a2"
    assert names(ring.take(1)) == "a3", "one at least"
    assert names(ring.take(100)) == "a6" and ring.take(100) == []
    assert ring.stats == RingStats(60, 0, 0)


def test_bytes_bound_what_is_taken() -> None:
    ring = filled(1 << 20, *(("a", request) for request in range(5)))
    assert names(ring.take(100, 3 * SIZE - 1)) == "a0 a1" and names(ring.take(100, 1)) == "a2"


def test_the_oldest_of_the_largest_go() -> None:
    ring = filled(4 * SIZE, ("a", 1), ("b", 2), ("a", 3), ("a", 4), ("c", 5), ("c", 6))
    assert ring.stats == RingStats(60, 20, 4 * SIZE)
    assert names(ring.take(100)) == "a4 b2 c5 c6"
    ring.put(piece("a", 7, 10_000))
    assert ring.take(100) == [] and ring.stats == RingStats(10_060, 10_020, 0), "larger than the ring"


def test_no_client_names_more_domains_than_there_is_room_for() -> None:
    ring = filled(1 << 30, *((f"d{n}", n) for n in range(MOST_DOMAINS + 20)))
    assert ring.stats.dropped_tokens == 200
    ring.put(piece("d3", 1))
    assert ring.stats.dropped_tokens == 200
    assert len(ring.take(1 << 30)) == MOST_DOMAINS + 1
    ring.put(piece("another", 1))
    assert ring.stats.dropped_tokens == 200


def test_that_it_overflows_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ring = filled(4 * SIZE, *(("a", request) for request in range(4)))
        assert not caplog.messages
        for request in range(20):
            ring.put(piece("a", request))
            ring.take(10)
        ring.put(piece("a", 1, 10_000))
    (said,) = caplog.messages
    assert "from here on some are dropped" in said and ring.stats.dropped_tokens > 10_000


def test_putting_does_not_wait_for_who_takes() -> None:
    ring = Ring(1 << 20)
    with ring._lock:
        ring.put(piece("a", 1))
        ring.put(piece("a", 2))
    assert ring.stats.captured_tokens == 0
    ring.put(piece("a", 3))
    assert ring.stats.captured_tokens == 30 and names(ring.take(100)) == "a1 a2 a3"


def test_threads_lose_and_double_nothing() -> None:
    ring, taken, done = Ring(200 * SIZE), list[Captured](), threading.Event()

    def put(first: int) -> None:
        dice = random.Random(first)
        for request in range(first, first + 2000):
            ring.put(piece(f"d{dice.randrange(5)}", request))

    def take() -> None:
        while not done.is_set():
            taken.extend(ring.take(100))

    writers = [threading.Thread(target=put, args=(first,)) for first in (0, 10_000)]
    readers = [threading.Thread(target=take) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    taken += ring.take(1 << 30)
    assert max(Counter(one.request for one in taken).values()) == 1
    assert ring.stats.captured_tokens == 40_000 == ring.stats.dropped_tokens + 10 * len(taken)
    assert ring.stats.held_bytes == 0


def test_its_figures_are_declared() -> None:
    assert [(one.name, how.kind, bool(how.metric)) for one, how in declared(RingStats)] == [
        ("captured_tokens", "counter", True), ("dropped_tokens", "counter", True), ("held_bytes", "gauge", True),
    ]  # fmt: skip
