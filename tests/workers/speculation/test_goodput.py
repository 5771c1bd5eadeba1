"""Step times learned per size, chances learned from what was reached, and the lengths that come of both."""

import random
from itertools import product

import pytest

from stepladder.workers.speculation.acceptance import Acceptance
from stepladder.workers.speculation.goodput import best_lengths
from stepladder.workers.speculation.step_time import BUCKETS, StepTime


def stairs(tokens: int, context: int) -> float:
    """Free up to six tokens, then a stair every eight, and a little for each position that is read."""
    return 0.030 + 0.006 * max(0, (tokens - 1) // 6) + 2e-6 * context


def taught(steps: int = 8000, noise: float = 0.1, seed: int = 0) -> StepTime:
    dice, learned = random.Random(seed), StepTime()
    for _ in range(steps):
        tokens, context = round(150 ** dice.random()), dice.randrange(100, 4000)
        seconds = stairs(tokens, context) * (1 + dice.uniform(-noise, noise))
        learned.observe(tokens, context, seconds * (20 if dice.random() < 0.01 else 1))  # the machine hiccups
    return learned


def test_step_times_are_known_at_every_size_one_token_included() -> None:
    learned = taught()
    for tokens, context in product((1, 2, 3, 4, 6, 8, 12, 17, 30, 60), (200, 3000)):
        assert learned(tokens, context) == pytest.approx(stairs(tokens, context), rel=0.15), (tokens, context)
    assert learned.per_context == pytest.approx(2e-6, rel=0.5)


def test_between_sizes_there_is_a_line_and_beyond_them_a_proportion() -> None:
    learned = StepTime()
    assert learned(5) == 0.0 and not learned.knows(5), "nothing is known yet"
    for tokens, seconds in ((1, 1.0), (8, 2.0)):
        learned.observe(tokens, 0, seconds)
    assert learned(4) == pytest.approx(1 + 3 / 7) and learned(16) == pytest.approx(4.0)
    assert learned(1) == 1.0 and learned.knows(8) and not learned.knows(4)


def test_old_steps_are_forgotten() -> None:
    learned = StepTime()
    for seconds in [1.0] * 100 + [2.0] * 100:
        learned.observe(3, 0, seconds)
    assert learned(3) == pytest.approx(2.0, rel=0.02)
    assert list(BUCKETS) == sorted({*BUCKETS})


def test_chances_come_from_what_was_reached() -> None:
    """Always right in the first place, never in the second: the third was never reached."""
    learned = Acceptance()
    for _ in range(200):
        learned.observe("a", [0.95, 0.35, 0.65], 1)
    first, second, third = learned.of("b", [0.95, 0.35, 0.65])
    assert first > 0.95 and second < 0.05 and third <= second
    assert learned.of("b", [0.65])[0] == pytest.approx(0.65), "as sure as the drafter is, since nobody knows better"
    assert [round(rate.accepted / rate.reached, 2) for rate in learned.positions] == [1.0, 0.0]


def test_a_request_that_is_unlike_others_is_known_by_itself() -> None:
    learned = Acceptance()
    for _ in range(100):
        learned.observe("easy", [0.55], 1)
        learned.observe("hard", [0.55], 0)
    easy, hard, new = (learned.of(name, [0.55])[0] for name in ("easy", "hard", "new"))
    assert hard < 0.1 < new < easy
    learned.forget("hard")
    assert learned.of("hard", [0.55])[0] == new


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_no_fixed_length_would_be_five_percent_better(batch: int, alpha: float) -> None:
    """Expected tokens per second, by what is learned against what is true."""
    learned, chances = taught(), [alpha ** (i + 1) for i in range(8)]

    def goodput(lengths: list[int]) -> float:
        expected = sum(1 + sum(chances[:length]) for length in lengths)
        return expected / stairs(batch + sum(lengths), 500 * batch)

    chosen = goodput(best_lengths([chances] * batch, batch, 500 * batch, learned).lengths)
    assert chosen >= 0.95 * max(goodput([k] * batch) for k in range(9))


def test_who_is_surer_gets_more() -> None:
    learned = StepTime()
    for tokens in range(1, 20):
        for _ in range(5):
            learned.observe(tokens, 0, 1.0 + 0.05 * tokens)
    lengths, gain = best_lengths([[0.9, 0.8, 0.7], [0.1, 0.01], [], [0.5, 0.04]], 4, 0, learned)
    assert lengths == [3, 0, 0, 1], "five tokens a second are a quarter of one in the time that a row takes"
    assert gain == pytest.approx((4 + 0.9 + 0.8 + 0.7 + 0.5) / 4 * learned(4) / learned(8))
    assert best_lengths([[0.05]], 1, 0, learned) == ([0], 1.0), "less than a row takes"
    assert best_lengths([], 0, 0, learned) == ([], 1.0)


def test_a_hiccup_of_the_machine_is_forgotten_at_once() -> None:
    learned = StepTime()
    for seconds in (9.0, 1.0, 1.0, 30.0, 1.0):
        learned.observe(4, 0, seconds)
    assert learned(4) == 1.0
