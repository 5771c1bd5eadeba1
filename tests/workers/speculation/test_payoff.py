"""Drafting rests while it does not pay, for as many sequences as it did not pay for."""

from itertools import pairwise

from stepladder.workers.speculation.payoff import COLD, JUDGED, LONGEST_REST, REST, STEPS, Payoff

TRIED = COLD + JUDGED  # steps of one sequence after which it may be given up


def asked(payoff: Payoff, steps: int, worth: float, decoding: int = 1) -> list[bool]:
    found = []
    for _ in range(steps):
        found.append(payoff.asks(decoding))
        if found[-1]:
            payoff.judge(1.5 + worth, 0.001, 0.002, decoding)
    return found


def test_what_pays_never_rests() -> None:
    assert all(asked(Payoff(), 500, 0.01))


def test_what_does_not_pay_is_tried_again_ever_more_rarely() -> None:
    found = asked(Payoff(), 20_000, -0.1)
    asks = [step for step, asks in enumerate(found) if asks]
    assert asks[:TRIED] == list(range(TRIED)) and asks[TRIED] == TRIED + REST
    assert asks[2 * TRIED] == 2 * TRIED + REST + 2 * REST, "the second rest is twice as long"
    rests = sorted({later - step - 1 for step, later in pairwise(asks)})
    assert rests[-1] == LONGEST_REST and len(asks) < 0.1 * 20_000


def test_many_sequences_say_as_much_in_fewer_steps() -> None:
    found = asked(Payoff(), 100, -0.1, decoding=16)
    assert found.index(False) == COLD + STEPS == COLD + 2 * JUDGED // 16


def test_what_clearly_costs_rests_soon() -> None:
    assert asked(Payoff(), COLD + STEPS + 1, -0.5) == [True] * (COLD + STEPS) + [False]
    assert all(asked(Payoff(), TRIED, -0.2))


def test_a_few_drafts_that_were_wrong_are_luck() -> None:
    payoff = Payoff()
    for step in range(2000):
        assert payoff.asks(1)
        payoff.judge(3.0 if step % 4 == 0 else 0.95, 0.001, 0.02, 1)


def test_a_hiccup_of_the_machine_is_not_what_drafting_takes() -> None:
    payoff = Payoff()
    for step in range(300):
        assert payoff.asks(1)
        payoff.judge(1.6, 0.4 if step % 5 == 4 else 0.001, 0.002, 1)


def test_what_is_cold_is_not_counted() -> None:
    payoff = Payoff()
    asked(payoff, COLD, -100.0)
    assert all(asked(payoff, 100, 0.01))


def test_what_does_not_pay_for_many_is_tried_with_few_and_stays_known_of_many() -> None:
    payoff = Payoff()
    asked(payoff, COLD + STEPS, -0.1, decoding=8)
    assert payoff.resting == REST and not payoff.asks(15) and payoff.resting == REST - 1
    assert all(asked(payoff, 100, 0.2, decoding=3)), "fewer sequences are another matter"
    assert payoff.resting == 0 and not payoff.asks(8) and payoff.resting == REST - 2
    payoff.forget()
    assert payoff.resting == 0 and payoff.asks(8)
