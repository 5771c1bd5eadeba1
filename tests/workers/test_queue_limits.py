"""Who may wait for a place, and what the others are told."""

import pytest

from stepladder.workers.core import Output, Request, SamplingParams
from stepladder.workers.server.queue_limits import Queue, QueueLimits


def request(prompt: int = 100, max_tokens: int = 1000) -> Request:
    return Request(id="r#1", prompt=(1,) * prompt, params=SamplingParams(max_tokens=max_tokens))


def waiting(limits: QueueLimits, *requests: Request) -> Queue:
    queue = Queue(limits)
    for one in requests:
        queue.accepted(one)
    return queue


def moving(queue: Queue, tokens_per_second: float, usual: int = 100) -> None:
    """It has been measured for ten seconds, in which answers had so many tokens."""
    for _ in range(100):
        queue.pace.stepped(int(tokens_per_second / 10), 0.1)
    queue.pace.gave([Output("a", [1] * usual, "stop") for _ in range(50)])


def test_requests_and_tokens_are_counted() -> None:
    for limits, why in ((QueueLimits(requests=2), "2 requests wait"), (QueueLimits(tokens=250), "200 tokens wait")):
        refusal = waiting(limits, request(), request()).refusal(request(), None)
        assert refusal and refusal.full and why in refusal.message and refusal.retry_after == 1.0
        assert waiting(limits, request()).refusal(request(50), None) is None
    assert Queue(QueueLimits(tokens=10)).refusal(request(), None) is None, "with nobody waiting, it is the next"


def test_the_wait_is_expected_from_how_fast_the_queue_has_moved() -> None:
    queue = waiting(QueueLimits(seconds=30.0))
    moving(queue, tokens_per_second=100.0)
    for _ in range(15):  # 200 tokens each: they may generate a thousand, but answers have a hundred
        assert queue.refusal(request(), None) is None
        queue.accepted(request())
    queue.accepted(request(prompt=1000))
    refusal = queue.refusal(request(), None)
    assert refusal and "a place would come after about 41 s, more than 30" in refusal.message
    assert refusal.retry_after == pytest.approx(11.0, rel=0.05), "by then, it would wait 30 s"


def test_a_client_that_will_have_left_by_then_is_refused() -> None:
    queue = waiting(QueueLimits())
    moving(queue, tokens_per_second=100.0)
    for _ in range(5):
        queue.accepted(request())
    assert queue.refusal(request(), patience=60.0) is None
    refusal = queue.refusal(request(), patience=2.0)
    assert refusal and "about 10 s, more than 2" in refusal.message
    assert refusal.retry_after == pytest.approx(8.0, rel=0.1)


def test_nothing_is_expected_before_anything_was_measured() -> None:
    queue = waiting(QueueLimits(seconds=0.1), *[request()] * 10)
    assert queue.refusal(request(), None) is None
    queue.pace.stepped(1, 0.5)
    assert queue.refusal(request(), None) is None
    queue.pace.stepped(1, 0.6)
    assert queue.refusal(request(), None)


def test_what_was_measured_long_ago_fades() -> None:
    queue = waiting(QueueLimits(), request())
    moving(queue, tokens_per_second=10.0)
    moving(queue, tokens_per_second=1000.0)
    moving(queue, tokens_per_second=1000.0)
    assert queue.pace.seconds(1000.0) == pytest.approx(1.0, rel=0.15)
