"""Rates of guesses."""

import random

import pytest

from stepladder.workers.speculation.drafters.calibration import Calibration


def test_from_an_estimate_to_what_happens_to_what_happens_now() -> None:
    draw, calibration = random.Random(0), Calibration([0.5, 0.5], prior=4)
    calibration.learn(0, True)
    assert calibration.rates == [0.6, 0.5], "the estimate counts as much as four guesses"
    for rate in (0.8, 0.2):
        for _ in range(2000):
            calibration.learn(0, draw.random() < rate)
        assert calibration.rates[0] == pytest.approx(rate, abs=0.08)
    assert calibration.rates[1] == 0.5
