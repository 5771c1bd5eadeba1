"""Training under load costs what the budget allows, whatever it costs where it goes on."""

import random
from math import inf

import pytest

from stepladder.cluster.throttle import Effect, Throttle, effect_of

STEP = 0.02


class Load:
    """An engine under load and a trainer that trains whenever it may.

    Args:
        noise: of each half second's time per step, as a share of it. stalls: how many of them take five times as long.
    """

    def __init__(self, throttle: Throttle, noise: float = 0.05, stalls: float = 0.0, seed: int = 0) -> None:
        self.throttle, self._noise, self._stalls = throttle, noise, stalls
        self._dice = random.Random(seed)
        self.now = self.steps = self.seconds = self.trained = 0.0
        self.idle = False  # the trainer has nothing to learn from

    def run(self, seconds: float, loss: float) -> tuple[float, float]:
        """The share of this time in which training went on, and what it cost on average."""
        began, trained, lost = self.now, self.trained, 0.0
        while self.now < began + seconds:
            self.throttle.feed(self.now, self.steps, self.seconds, self.trained)
            training = self.throttle.allowed and not self.idle
            slower = 1 + loss * training
            lost += 0.5 * loss * training
            noise = self._dice.gauss(1, self._noise) * (5 if self._dice.random() < self._stalls else 1)
            self.now += 0.5
            self.seconds += 0.5
            self.steps += 0.5 / (STEP * slower * noise)
            self.trained += 0.5 * training
        return (self.trained - trained) / seconds, lost / seconds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "least", "most"), [(0.0, 0.6, 0.8), (0.03, 0.5, 0.8), (0.2, 0.1, 0.25), (1.0, 0.02, 0.05)]
)
def test_the_cost_stays_within_the_budget_and_the_rest_is_used(
    loss: float, least: float, most: float, seed: int
) -> None:
    load = Load(Throttle(seed=seed), seed=seed)
    load.run(1800, loss)
    share, cost = load.run(3600, loss)
    assert cost <= 0.05 and least <= share <= most + 0.02
    effect = load.throttle.effect
    assert effect.low - 0.02 <= loss <= effect.high + 0.02 and effect.high - effect.low < 0.15 + 0.2 * loss
    assert (
        load.throttle.cost == pytest.approx(load.throttle.share * max(0.0, effect.loss)) and load.throttle.cost < 0.05
    )


def test_it_begins_carefully() -> None:
    """A tenth of the time until something is known; and a loss that shows itself is heeded at once."""
    throttle = Throttle()
    share, cost = Load(throttle).run(100, 0.3)
    assert share <= 0.15 and cost <= 0.05 and throttle.effect.cycles >= 2


def test_it_recovers_when_the_loss_is_gone_and_gives_way_when_it_is_back() -> None:
    load = Load(Throttle())
    load.run(1200, 0.2)
    assert load.throttle.share < 0.3
    load.run(150, 0.0)
    assert load.throttle.share > 0.6
    load.run(1800, 0.0)
    load.run(120, 0.2)
    assert load.throttle.share < 0.3
    assert load.run(600, 0.2)[1] <= 0.05


def test_stalls_of_the_machine_are_not_taken_for_training() -> None:
    load = Load(Throttle(), stalls=0.01)
    load.run(1800, 0.0)
    assert load.run(1800, 0.0)[0] > 0.3


def test_it_is_always_measured_a_little() -> None:
    load = Load(Throttle())
    load.run(3600, 5.0)
    assert 0 < load.run(1800, 5.0)[0] < 0.04
    load = Load(Throttle())
    load.run(1800, 0.0)
    assert load.run(1800, 0.0)[0] < 0.85, "windows without training go on"


def test_no_budget_no_training_under_load() -> None:
    load = Load(Throttle(0.0))
    assert load.run(600, 0.0) == (0.0, 0.0) and load.throttle.cost == 0.0


@pytest.mark.parametrize("budget", [-0.01, 1.0])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=rf"train.max_tpot_loss is {budget}; it must be at least 0 and below 1"):
        Throttle(budget)


def test_windows_in_which_nobody_trained_teach_nothing() -> None:
    """Or a trainer without lessons would be taken for one that costs nothing."""
    load = Load(Throttle())
    load.idle = True
    load.run(600, 0.5)
    assert load.throttle.effect == Effect() and load.throttle.share == 0.1
    load.idle = False
    load.run(600, 0.5)
    assert load.throttle.effect.loss == pytest.approx(0.5, abs=0.1)


def test_windows_without_load_teach_nothing() -> None:
    throttle = Throttle()
    for tick in range(2000):
        throttle.feed(tick / 2, tick * 0.5, tick * 0.5, tick)  # three steps in a window
    assert throttle.effect == Effect()


def test_a_pause_begins_a_new_window() -> None:
    throttle = Throttle()
    throttle.feed(0.0, 0, 0, 0)
    until = throttle.until
    throttle.pause()
    assert not throttle.allowed and throttle.until == -inf
    throttle.feed(until - 1, 0, 0, 0)
    assert throttle.until > until


def test_an_allowed_stretch_ends_when_it_was_said_to() -> None:
    """A lease may be as long as that."""
    load, changes = Load(Throttle()), 0
    load.run(1800, 0.0)
    said, allowed = load.throttle.until, load.throttle.allowed
    for _ in range(2000):
        load.run(0.5, 0.0)
        if load.throttle.allowed != allowed:
            assert load.now - 0.5 >= said, "not before"
            changes, allowed = changes + 1, load.throttle.allowed
        said = load.throttle.until
    assert changes > 50


def test_the_trimmed_mean_and_its_interval() -> None:
    assert effect_of([]) == Effect()
    assert effect_of([0.3]) == Effect(0.3, -inf, inf, 1)
    assert effect_of([0.1, 0.3]) == pytest.approx(Effect(0.2, 0.2 - 6.31 * 0.1, 0.2 + 6.31 * 0.1, 2))
    plain = effect_of([0.01 * value for value in range(20)])
    wild = effect_of([0.01 * value for value in range(19)] + [50.0])
    assert plain.loss == wild.loss == pytest.approx(0.095) and plain == wild
    assert plain.low < plain.loss < plain.high and plain.high - plain.low < 0.06


def test_nine_of_ten_intervals_hold_the_truth() -> None:
    dice = random.Random(1)
    found = [effect_of([dice.gauss(0.1, 0.05) for _ in range(12)]) for _ in range(1000)]
    assert 0.86 <= sum(one.low <= 0.1 <= one.high for one in found) / 1000 <= 0.94
