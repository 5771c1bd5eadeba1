"""How much training requests can stand: windows with and without it in turns, with it no more often than a budget has
room for."""

import random
from collections import deque
from collections.abc import Sequence
from math import ceil, inf, sqrt
from typing import NamedTuple

FIRST = 10  # windows of the first cycles, one of which is with training, where nothing else speaks for it
FEWEST, MOST = 5, 60  # of a cycle with little and with much at stake: each has windows of both kinds
CAREFUL = 3  # cycles in which nothing is known
KEPT = 24  # cycles that the effect is read from
NEWEST = 4  # cycles that, where they disagree with all those before, count alone
UNEVEN = 0.25  # by which windows differ in length, so that load which comes and goes with them is seen too
LEAST_STEPS = 8  # of a window that says anything
T90 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80, 1.78, 1.77, 1.76, 1.75)  # Student's, two-sided


class Effect(NamedTuple):
    """What training adds to the time per step, and so per token, while it goes on: a share of it, with a 90 % interval.

    Attributes:
        cycles: that it was read from; of none, nothing is known.
    """

    loss: float = 0.0
    low: float = -inf
    high: float = inf
    cycles: int = 0


class _Window:
    """What was run in it, since a little after its beginning: what it changed has to arrive first."""

    def __init__(self, on: bool, begin: float, end: float, guard: float) -> None:
        self.on, self.end, self._from = on, end, begin + guard
        self._before: tuple[float, float] | None = None
        self.steps = self.seconds = 0.0
        self._trained: float | None = None
        self.trained = False

    def feed(self, now: float, steps: float, seconds: float, trained: float) -> None:
        if self._trained is None:
            self._trained = trained
        self.trained |= trained > self._trained
        if now >= self._from:
            before = self._before or (steps, seconds)
            self.steps, self.seconds, self._before = steps - before[0], seconds - before[1], before

    @property
    def tells(self) -> bool:
        """Whether there was load, and with training, if that was to be: else its like is tried again."""
        return self.steps >= LEAST_STEPS and self.trained >= self.on


class Throttle:
    """Asked while there is load. Time is cut into windows, windows into cycles in which at least one is with training
    and one without; each cycle compares the two. Training may have the share of windows that keeps its cost on average,
    by the upper end of what is known of it, within the budget; the share at most doubles from cycle to cycle, and
    falls at once.

    Args:
        max_loss: of time per token, on average, as a share of it; 0 lets nothing be trained under load.
        first: windows of the first cycles, one of which is with training.
        window: seconds, on average. guard: seconds at its beginning that do not count.
        seed: of the order of windows in a cycle.

    Attributes:
        share: of the windows in which training is allowed.
    """

    def __init__(
        self, max_loss: float = 0.05, first: int = FIRST, window: float = 3.0, guard: float = 0.75, seed: int = 0
    ) -> None:
        if not 0 <= max_loss < 1:
            raise ValueError(f"train.max_tpot_loss is {max_loss}; it must be at least 0 and below 1")
        assert guard < window * (1 - UNEVEN)
        self._max_loss, self._length, self._guard = max_loss, window, guard
        self._dice = random.Random(seed)
        self._losses: deque[float] = deque(maxlen=KEPT)
        self._window: _Window | None = None
        self._plan: list[bool] = []
        self._done: list[_Window] = []
        self.effect, self.share = Effect(), 1 / first if max_loss else 0.0

    @property
    def allowed(self) -> bool:
        """Whether training may go on now."""
        return self._window is not None and self._window.on

    @property
    def until(self) -> float:
        """When that changes, on the clock of `feed`, as far as it is planned."""
        if not self._window:
            return -inf
        alike = next((place for place, on in enumerate(self._plan) if on is not self._window.on), len(self._plan))
        return self._window.end + (alike - 1) * self._length * (1 - UNEVEN)

    @property
    def cost(self) -> float:
        """What training costs on average under load: its effect in the share of time that it has."""
        return self.share * max(0.0, self.effect.loss)

    def feed(self, now: float, steps: float, seconds: float, trained: float) -> None:
        """What there is so far, several times in a window.

        Args:
            steps: of engines, in all. seconds: that these took; per step, and not per token, so that it does not matter
                how many requests shared a step. trained: of training, in any unit.
        """
        if self._window is None or now >= self._window.end + self._length:  # nobody has asked for a while
            self._open(now)
        assert self._window
        self._window.feed(now, steps, seconds, trained)
        if now >= self._window.end:
            self._close()
            self._open(now)
            self._window.feed(now, steps, seconds, trained)

    def pause(self) -> None:
        """There is no load now: the window that has begun does not count."""
        self._window = None

    def _open(self, now: float) -> None:
        if not self._plan:
            self._plan = self._cycle()
        length = self._length * self._dice.uniform(1 - UNEVEN, 1 + UNEVEN)
        self._window = _Window(self._plan[0], now, now + length, self._guard)

    def _close(self) -> None:
        assert self._window
        if not self._window.tells:
            self._dice.shuffle(self._plan)  # so that a trainer that has nothing to do does not stop the measurement
            return
        self._plan.pop(0)
        self._done.append(self._window)
        if not self._plan:
            self._judge()
            self._done = []

    def _cycle(self) -> list[bool]:
        """Windows of the next one: of some, one with training; or one without it."""
        if not self._max_loss:
            return [False]
        if self.share <= 0.5:
            plan = [True] + [False] * (ceil(1 / self.share - 1e-9) - 1)
        else:
            plan = [True] * int(1 / (1 - self.share) + 1e-9 - 1) + [False]
        self._dice.shuffle(plan)
        return plan

    def _judge(self) -> None:
        """What the cycle that has just ended teaches, and the share that follows."""
        per_step = [_per_step([window for window in self._done if window.on is on]) for on in (True, False)]
        if not self._max_loss or not per_step[1]:
            return
        self._losses.append(per_step[0] / per_step[1] - 1)
        self.effect = self._known()
        sure = self.effect.cycles >= CAREFUL
        wanted = self._max_loss / max(self.effect.high if sure else self.effect.loss, 1e-9)
        self.share = min(max(wanted, 1 / MOST), self.share * (1 + sure), 1 - 1 / FEWEST)

    def _known(self) -> Effect:
        newest, older = list(self._losses)[-NEWEST:], list(self._losses)[:-NEWEST]
        if len(older) >= NEWEST:
            now, before = effect_of(newest), effect_of(older)
            if now.low > before.high or now.high < before.low:
                self._losses = deque(newest, maxlen=KEPT)
        return effect_of(self._losses)


def effect_of(losses: Sequence[float] | deque[float]) -> Effect:
    """The trimmed mean and its interval (Yuen 1974): a tenth of either end weighs no more than its neighbour, so that
    a stall of the machine is no effect of training."""
    ordered, cut = sorted(losses), len(losses) // 10
    kept = ordered[cut : len(ordered) - cut]
    if len(kept) < 2:
        return Effect(kept[0] if kept else 0.0, -inf, inf, len(ordered))
    mean = sum(kept) / len(kept)
    winsorized = [*[kept[0]] * cut, *kept, *[kept[-1]] * cut]
    centre = sum(winsorized) / len(winsorized)
    squares = sum((value - centre) ** 2 for value in winsorized)
    error = sqrt(squares / (len(kept) * (len(kept) - 1)))
    half = error * (T90[len(kept) - 2] if len(kept) - 2 < len(T90) else 1.70)
    return Effect(mean, mean - half, mean + half, len(ordered))


def _per_step(windows: list[_Window]) -> float:
    return sum(window.seconds for window in windows) / max(1e-9, sum(window.steps for window in windows))
