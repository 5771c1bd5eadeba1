"""One more drafted token: worth its time, or not."""

from math import inf

import pytest

from stepladder.workers.core import Request, SamplingParams, Sequence, StepPlan
from stepladder.workers.speculation.drafter import Verified
from stepladder.workers.speculation.pace import Pace
from stepladder.workers.speculation.price import TRIED, Price, Terms
from stepladder.workers.speculation.step_time import StepTime


def known(seconds: float, sure: list[float]) -> Price:
    price = Price()
    for one in sure * 20:
        price.paid(seconds, [one])
    return price


def test_a_token_is_drafted_where_it_saves_more_than_it_takes() -> None:
    price, terms = known(1.0, [0.525]), Terms(4.0)  # it saves 2.1 of what it takes
    assert price.better() == pytest.approx(0.525)
    assert price.pays(terms, 0.5) and not price.pays(terms, 0.45)
    dear = Terms(40.0)
    assert price.pays(dear, 0.06) and not price.pays(dear, 0.04), "never where it is next to impossible"
    assert not price.pays(Terms(1.5))


def test_what_verifying_takes_counts_unless_there_is_a_token_anyway() -> None:
    price, terms = known(1.0, [0.975]), Terms(2.2, verifying=1.0)
    assert price.pays(Terms(2.0, verifying=1.0)) is False, "1.95 saved, 1 + .975 spent"
    assert price.pays(terms) and not price.pays(terms, than=0.6) and price.pays(terms, than=0.4)


def test_a_second_opinion_is_worth_what_it_is_better_by() -> None:
    price, terms = known(0.1, [0.925, 0.225]), Terms(1.0)
    assert price.better(0.5) == pytest.approx(0.425 / 2, rel=0.01), "the other half of the time it says less"
    assert price.pays(terms, than=0.5) and not price.pays(terms, than=0.8)


def test_many_drafts_share_what_a_token_takes_and_hiccups_do_not_count() -> None:
    price, terms = known(8.0, [0.525] * 8), Terms(4.0)
    for _ in range(20):
        price.paid(8.0, [0.525] * 8)
    assert price.pays(terms)
    for _ in range(5):
        price.paid(1000.0, [0.525])
    assert price.pays(terms)


def test_what_does_not_pay_is_tried_again() -> None:
    price = known(1.0, [0.525])
    assert [price.pays(Terms(1.0)) for _ in range(2 * TRIED)].count(True) == 2


def test_a_threshold_is_all_that_counts_if_it_is_given() -> None:
    price = Price(0.5)
    price.paid(1000.0, [0.1])
    assert price.pays(Terms(1.0), 0.5) and not price.pays(Terms(1.0), 0.49)


def test_until_something_is_known() -> None:
    price = Price()
    assert Terms() == Terms(inf, 0.0)
    assert price.pays(Terms(), 0.25) and not price.pays(Terms(), 0.2)
    price.paid(1.0, [0.5])
    assert price.pays(Terms(), 0.06)
    assert price.pays(None, 0.25) and not price.pays(None, 0.2), "what is not to be weighed"
    assert price.pays(None, than=0.7) and not price.pays(None, than=0.8)


def test_the_pace_is_that_of_steps_that_decode() -> None:
    step_time, pace = StepTime(), Pace()
    for _ in range(30):
        for tokens in range(1, 13):
            step_time.observe(tokens, 0, 1.0 + 0.1 * tokens)
    assert pace.terms(step_time, 1, 0) == Terms(inf, pytest.approx(0.1))
    sequence = Sequence(Request(id="a", prompt=(1, 2), params=SamplingParams()))
    for _ in range(100):
        pace.observe(step_time, StepPlan(tokens=[1, 2, 3, 4]), [Verified(sequence, (2, 3, 4), (2, 3))], 0.6)
        pace.observe(step_time, StepPlan(tokens=[1] * 40), [Verified(sequence, (), (2,))], 0.0)  # a prompt
    assert pace.terms(step_time, 4, 0) == Terms(pytest.approx(1.0), pytest.approx(0.1)), "1.4 + .6, for two tokens"
    assert pace.terms(step_time, 11, 0).verifying == 0.0, "nothing is known of 19"
