"""Time in which a process did not run itself is nobody else's silence."""

import pytest

from stepladder.cluster import ray_wait
from stepladder.workers import silence
from stepladder.workers.silence import Silence


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(silence, "monotonic", lambda: now[0])
    return now


def test_silence_adds_up(clock: list[float]) -> None:
    one = Silence(tick=1.0)
    for _ in range(10):
        clock[0] += 1.1
        found = one.seconds
    assert found == pytest.approx(11.0)
    one.broken()
    assert one.seconds == 0.0


def test_a_sleep_of_our_own_counts_as_two_ticks(clock: list[float]) -> None:
    one = Silence(tick=1.0)
    clock[0] += 3600
    assert one.seconds == 2.0


def test_whoever_slept_while_it_waited_for_ray_takes_the_answer(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([([], ["ref"]), ([], ["ref"]), (["ref"], [])])

    def wait(refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        clock[0] += 60  # we were stopped meanwhile
        return next(answers)

    monkeypatch.setattr(ray_wait.ray, "wait", wait)
    monkeypatch.setattr(ray_wait.ray, "get", lambda refs: [f"answer of {ref}" for ref in refs])
    assert ray_wait.wait_for(["ref"], seconds=10.0) == ["answer of ref"]
    answers = iter([([], ["ref"])] * 100)
    with pytest.raises(TimeoutError, match="no answer within 10 s"):
        ray_wait.wait_for(["ref"], seconds=10.0)
