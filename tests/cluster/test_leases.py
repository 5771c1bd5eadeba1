"""Leases through simulated days of load: given where nobody loses by it, taken back at once, and all accounted for."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.cluster.idleness import Idleness, Reading
from stepladder.cluster.lease_accounts import Accounts
from stepladder.cluster.leases import LeaseRules, Ledger
from stepladder.parallel.clock import Split
from stepladder.workers.speculation.learning.busy_word import Word
from stepladder.workers.speculation.learning.lease import GAPS, SPARE, UNDER_LOAD, Lease, LeaseNotice, Use
from stepladder.workers.speculation.learning.lease_trace import END, LOAD, delays
from stepladder.workers.speculation.learning.permit import Permit

TICK = 0.05  # seconds of a simulated world
PING = 10  # ticks between two looks of the controller
STEP = 0.02


class Requests(NamedTuple):
    """What an engine has: running, and of the engine's requests those that wait."""

    running: int = 0
    waiting: int = 0


NONE = Requests()


class Engine:
    """Rank 0 has its clock; a second rank waits for it a little."""

    def __init__(self, beside: bool = True) -> None:
        self.alive, self.beside, self.since = True, beside, 0.0
        self.requests = NONE
        self.restart()

    def restart(self) -> None:
        self.busy = self.idle = self.steps = 0.0

    def pass_by(self, now: float, requests: Requests, slower: float) -> None:
        if not self.alive:
            requests = NONE
        if requests != NONE and self.requests == NONE:
            self.since = now
        self.requests = requests
        if requests == NONE:
            self.idle += TICK
        else:
            self.busy += TICK
            self.steps += TICK / (STEP * slower)

    def reading(self) -> Reading:
        if not self.alive:
            return Reading(beside=self.beside)
        clocks = Split(self.busy, 0.0, self.idle), Split(0.9 * self.busy, 0.1 * self.busy, self.idle)
        return Reading(clocks, *self.requests, int(self.steps), beside=self.beside)

    def word(self) -> Word:
        return Word(self.requests.running + self.requests.waiting, self.requests.waiting, self.since)


class World:
    """A ledger, engines, and a trainer of two ranks that hear notices some ticks after each other.

    Args:
        ticks: that a micro-batch takes. delays: in ticks, of messages to each rank.
    """

    def __init__(
        self,
        engines: int = 1,
        ticks: int = 4,
        delays: tuple[int, int] = (0, 1),
        max_loss: float = 0.05,
        loss: float = 0.0,
        beside: bool = True,
    ) -> None:
        self.tick, self.engines, self._ticks, self._delays = 0, [Engine(beside) for _ in range(engines)], ticks, delays
        self._loss, self.heeds = loss, True  # whether the trainer knows when to stop
        self.ledger = Ledger("trainer", 2, max_loss=max_loss)
        self.restart_trainer()
        self._left, self._open = 0, ExitStack()
        self._post: list[tuple[int, int, LeaseNotice]] = []  # when, to which rank
        self._told: LeaseNotice | None = None
        self.in_force: list[tuple[float, Lease | None]] = []  # at each look
        self.begun = 0

    @property
    def now(self) -> float:
        return 1000 + self.tick * TICK

    def restart_trainer(self) -> None:
        own: Callable[[], float] = lambda: self.now - 500  # noqa: E731 - the trainer's machine has another clock
        self.permits = [Permit(word=self._word, now=own, cpu=own) for _ in range(2)]
        self.trainer_alive, self._told = True, None

    def run(self, seconds: float, requests: Requests = NONE) -> None:
        """With this load on each engine."""
        for _ in range(round(seconds / TICK)):
            self._pass_by(requests)

    def kinds(self, since: float = 0.0) -> list[str | None]:
        return [lease.kind if lease else None for when, lease in self.in_force if when > since]

    def _pass_by(self, requests: Requests) -> None:
        slower = 1 + self._loss * (self._left > 0)
        for engine in self.engines:
            engine.pass_by(self.now - 500, requests, slower)
        if self.tick % PING == 0:
            self._look()
        for when, rank, notice in self._post:
            if when == self.tick:
                self.permits[rank].hear(notice)
        if self.trainer_alive:
            self._train()
        self.tick += 1

    def _look(self) -> None:
        uses = [permit.use() for permit in self.permits] if self.trainer_alive else []
        before = self.ledger.accounts
        notice = self.ledger.look(self.now, {str(i): one.reading() for i, one in enumerate(self.engines)}, uses)
        self.in_force.append((self.now, notice.lease))
        if notice != self._told:
            self._told = notice
            self._post += [(self.tick + delay, rank, notice) for rank, delay in enumerate(self._delays)]
        after = self.ledger.accounts
        assert after.granted - after.ended == (self.ledger.lease is not None)
        assert all(
            late >= early - 1e-9 for early, late in zip(vars(before).values(), vars(after).values(), strict=True)
        )
        assert after.seconds <= self.now - 1000 + 1e-6, "never two at once"

    def _train(self) -> None:
        """Both ranks together, or none."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._open.close()
        opinions = [permit.may() for permit in self.permits]
        if not self._left and (all(opinions) or not self.heeds):
            self._left, self.begun = self._ticks, self.begun + 1
            for permit in self.permits:
                self._open.enter_context(permit.micro_batch())

    def kill_trainer(self) -> None:
        self.trainer_alive, self._left, self._open = False, 0, ExitStack()

    def _word(self) -> Word:
        words = [engine.word() for engine in self.engines if engine.alive and engine.beside]
        return Word(*(sum(w[i] for w in words) for i in range(2)), max((w.since for w in words), default=0.0))


def check_books(world: World) -> Accounts:
    """What the ledger says is what happened, as far as it can know."""
    accounts = world.ledger.accounts
    assert accounts.granted == accounts.ended + (world.ledger.lease is not None)
    assert accounts.micro_batches <= world.begun
    assert accounts.core_seconds == pytest.approx(
        2 * world._ticks * TICK * accounts.micro_batches, abs=2 * world._ticks
    )
    assert accounts.overrun_micro_batches <= accounts.ended, "at most the one that was under way"
    assert accounts.overrun_seconds <= accounts.overrun_micro_batches * world._ticks * TICK + 1e-6
    for permit in world.permits:
        assert all(delay.micro_batches <= 1 for delay in delays(permit.trace.rows(), END))
    return accounts


def test_a_day() -> None:
    """A quiet night, a morning of bursts, a peak with requests that wait, an engine that dies, the evening."""
    world = World(max_loss=0.0)  # nothing under load, so that it can be reckoned up
    world.run(60)
    night = check_books(world)
    assert world.kinds()[:3] == [None, None, None], "what was idle is not known yet"
    assert world.kinds()[4:] == [GAPS] * (len(world.kinds()) - 4)
    assert (night.granted, night.ended, night.overrun_micro_batches) == (1, 0, 0)
    assert night.seconds == pytest.approx(57.5, abs=1.0) and night.renewed >= 20
    assert night.micro_batches == pytest.approx(57.5 / 0.2, rel=0.03)
    assert night.core_seconds == pytest.approx(2 * 0.2 * night.micro_batches, abs=0.5)
    assert world.ledger.compute_share == 1.0

    begun = world.begun
    for _ in range(20):
        world.run(1, Requests(2))
        world.run(2)
    bursts, last = check_books(world), world.now
    assert bursts.revoked == 1 and world.begun == begun == bursts.micro_batches, "the first burst ended it"

    world.run(30, Requests(4, 3))
    peak = check_books(world)
    assert set(world.kinds(last)) == {None} and peak.micro_batches == bursts.micro_batches
    assert world.ledger.loads["0"][1:] == (4, 3, True) and world.ledger.loads["0"].idle == pytest.approx(0.0)
    assert world.ledger.compute_share == 0.0

    world.engines[0].alive = False
    world.run(20)
    assert check_books(world).granted == 1, "its machine is for getting it back"
    world.engines[0].alive = True
    world.engines[0].restart()
    world.run(20)
    evening = check_books(world)
    assert (evening.granted, evening.revoked, evening.ended) == (2, 1, 1)
    assert evening.seconds - peak.seconds == pytest.approx(18, abs=1.0)
    world.run(2, Requests(1))
    assert world.begun == check_books(world).micro_batches > evening.micro_batches - 1


def test_gaps_between_requests_are_used_and_the_word_keeps_load_from_waiting() -> None:
    """Half of them from the first minute on; nearly all, once the throttle has found that this costs nothing."""
    world = World()
    world.run(20)
    begun = world.begun
    for _ in range(20):
        world.run(0.5, Requests(2))
        world.run(2.5)
    assert 0.25 < (world.begun - begun) * 0.2 / (20 * 2.5) < 0.75
    for _ in range(400):
        world.run(0.5, Requests(2))
        world.run(2.5)
    accounts = check_books(world)
    assert {GAPS} <= set(world.kinds()) <= {GAPS, None}
    assert accounts.micro_batches > 0.5 * 400 * 2.5 / 0.2 and world.ledger.throttles[GAPS].share > 0.6
    rows = world.permits[0].trace.rows()
    assert len(delays(rows)) > 50 and all(one.micro_batches <= 1 and one.seconds <= 0.2 for one in delays(rows))


@pytest.mark.parametrize(("loss", "least", "most"), [(0.0, 0.5, 0.85), (0.2, 0.08, 0.26)])
def test_under_load_the_throttle_gives_leases(loss: float, least: float, most: float) -> None:
    world = World(loss=loss)
    world.run(600, Requests(4))
    before = world.ledger.accounts
    world.run(600, Requests(4))
    accounts, figures = check_books(world), world.ledger.figures()
    assert set(world.kinds(1010)) == {UNDER_LOAD, None}
    assert least <= (accounts.micro_batches - before.micro_batches) * 0.2 / 600 <= most
    assert figures["load_tpot_loss"] == pytest.approx(loss, abs=0.06) and figures["load_tpot_cost"] < 0.0501
    assert figures["load_tpot_loss_low"] <= figures["load_tpot_loss"] <= figures["load_tpot_loss_high"]
    assert 0 < figures["compute_share"] < 0.5 and figures["lease_granted"] == accounts.granted
    assert accounts.expired > 20, "at the end of its windows a lease ends by itself"


def test_gaps_and_load_are_measured_apart() -> None:
    """What training costs beside steps says nothing of gaps, and the other way round."""
    world = World(loss=0.5)
    for _ in range(10):
        world.run(60, Requests(4))
        for _ in range(20):
            world.run(0.5, Requests(2))
            world.run(2.5)
    figures, throttles = world.ledger.figures(), world.ledger.throttles
    assert figures["load_tpot_loss"] > 0.3 > 0.1 > figures["gaps_tpot_loss"]
    assert throttles[UNDER_LOAD].share < 0.15 < 0.3 < throttles[GAPS].share
    check_books(world)


def test_requests_that_wait_end_a_lease_under_load() -> None:
    world = World()
    world.run(600, Requests(4))
    while not world.ledger.lease:
        world.run(0.5, Requests(4))
    world.run(0.5, Requests(4))
    began, before = world.now, world.begun
    world.run(60, Requests(4, 1))
    assert set(world.kinds(began + 0.6)) == {None} and world.begun == before == check_books(world).micro_batches


def test_a_trainer_beside_nobody_always_has_a_lease() -> None:
    world = World(beside=False)
    world.run(30, Requests(8, 5))
    accounts = check_books(world)
    assert world.kinds() == [SPARE] * 60 and accounts.granted == 1
    assert accounts.micro_batches == pytest.approx(30 / 0.2, abs=2)


def test_spare_groups_are_in_nobodys_way() -> None:
    ledger = Ledger("trainer", 1)
    spare = Reading((Split(busy=1e6),), serves=False)
    assert ledger.look(0.0, {"spare": spare}, [Use()]).lease == Lease(2, "trainer", 1, 5.0, 256, SPARE, 5.0)
    assert not ledger.loads["spare"].serves


def test_one_busy_engine_of_two_is_enough() -> None:
    busy_here, busy_elsewhere = (Ledger("trainer", 1, max_loss=0.0) for _ in range(2))
    for now in range(10):
        quiet, busy = Reading((Split(idle=now),)), Reading((Split(busy=0.6 * now, idle=0.4 * now),))
        assert busy_here.look(now, {"a": quiet, "b": busy}, [Use()]).lease is None
        notice = busy_elsewhere.look(now, {"a": quiet, "b": busy._replace(beside=False)}, [Use()])
    assert notice.lease and busy_here.loads["b"].idle == pytest.approx(0.4)


def test_a_lost_trainer_loses_its_lease_and_the_next_gets_another() -> None:
    world = World()
    world.run(30)
    before = check_books(world)
    world.kill_trainer()
    world.run(5)
    accounts = world.ledger.accounts
    assert (accounts.lost, accounts.ended, world.ledger.lease) == (1, 1, None)
    assert accounts.micro_batches == pytest.approx(before.micro_batches, abs=3)
    world.restart_trainer()
    world.run(10)
    assert world.ledger.accounts.granted == 2
    assert world.ledger.accounts.micro_batches == pytest.approx(before.micro_batches + 50, abs=5)


def test_a_lease_is_returned_and_there_is_none_until_the_trainer_wants_one() -> None:
    world = World()
    world.run(10)
    for permit in world.permits:
        permit.give_back()
    world.run(10)
    accounts = check_books(world)
    assert (accounts.granted, accounts.returned, world.ledger.lease) == (1, 1, None)
    for permit in world.permits:
        permit.want()
    world.run(10)
    assert check_books(world).granted == 2


def test_a_controller_that_is_late_finds_its_lease_expired() -> None:
    """And the trainer has stopped by itself."""
    ledger, clock = Ledger("trainer", 1), [0.0]
    permit = Permit(now=lambda: clock[0])
    permit.hear(ledger.look(0.0, {}, [permit.use()]))
    assert permit.may()
    clock[0] = 5.0
    assert not permit.may()
    notice = ledger.look(60.0, {}, [permit.use()])
    assert notice.lease is None and ledger.accounts.expired == 1 and ledger.accounts.seconds == 5.0
    permit.hear(notice)
    notice = ledger.look(60.5, {}, [permit.use()])
    permit.hear(notice)
    assert notice.lease and notice.lease.number == 4 and permit.may()


def test_no_lease_while_a_rank_has_not_stopped() -> None:
    """Neither while one is in a micro-batch, nor while one has not heard that the last lease has ended."""
    ledger = Ledger("trainer", 2)
    one = ledger.look(0.0, {}, [Use(), Use()])
    assert one.lease
    told = Use(one.serial, one.lease.number, 3)
    ended = ledger.look(1.0, {}, [told._replace(returned=True), told])
    assert ended.lease is None
    heard = told._replace(serial=ended.serial)
    for uses in ([heard, told], [heard, heard._replace(at_work=True)], [heard, heard._replace(wants=False)]):
        assert ledger.look(2.0, {}, uses) == ended
    assert ledger.look(3.0, {}, [heard, heard]).lease


def test_whoever_trains_on_without_a_lease_is_noticed() -> None:
    world = World(max_loss=0.0)
    world.run(20)
    world.heeds = False
    world.run(20, Requests(1))
    accounts = world.ledger.accounts
    assert accounts.revoked == 1 and accounts.overrun_micro_batches == pytest.approx(20 / 0.2, abs=6)
    assert accounts.overrun_seconds == pytest.approx(20, abs=1.5)


def test_ranks_that_hide_it_are_noticed_too() -> None:
    """By what they count, whatever they say of being late."""
    ledger = Ledger("trainer", 1)
    lease = ledger.look(0.0, {}, [Use()]).lease
    assert lease
    ended = ledger.look(1.0, {}, [Use(2, lease.number, 5, returned=True)])
    for now, begun in ((1.5, 6), (2.0, 9)):
        ledger.look(now, {}, [Use(ended.serial, lease.number, begun, at_work=True)])
    assert ledger.accounts.overrun_micro_batches == 3


def test_numbers_go_on_where_another_controller_was() -> None:
    ledger = Ledger("trainer", 1, first=100)
    assert ledger.notice == LeaseNotice(100, None)
    old = Use(57, 50, 4, at_work=False)
    assert ledger.look(0.0, {}, [old]).lease is None, "it may still believe in a lease of the one before"
    assert ledger.look(1.0, {}, [old._replace(serial=100)]).lease == Lease(101, "trainer", 1, 6.0, 256, SPARE, 5.0)


def test_a_life_that_begins_anew_is_not_taken_for_idle() -> None:
    idleness = Idleness(4.0)
    for now in range(5):
        idleness.feed(now, Reading((Split(0.25 * now, 0.0, 0.75 * now),), running=3, steps=10 * now, threads=2))
    assert idleness.share == pytest.approx(0.75)
    assert (idleness.steps, idleness.step_seconds, idleness.core_seconds) == (10, 0.25, 0.5)
    for now, idle in ((5, 0.5), (6, 1.5)):
        idleness.feed(now, Reading((Split(0.0, 0.0, idle),)))
        assert idleness.share is None and idleness.steps == 0
    idleness.feed(8, Reading((Split(0.5, 0.0, 3.0),)))
    assert idleness.share == pytest.approx(2.5 / 3.0)
    idleness.feed(9, Reading())
    assert idleness.share is None


def test_the_busiest_rank_counts_and_waiting_is_not_idle() -> None:
    idleness = Idleness(2.0)
    for now in range(6):
        idleness.feed(now, Reading((Split(0.0, 0.0, now), Split(0.1 * now, 0.7 * now, 0.2 * now))))
    assert idleness.share == pytest.approx(0.2)


SEGMENTS = st.lists(
    st.tuples(
        st.sampled_from(["load", "die", "restart", "kill trainer", "restart trainer", "give back", "want"]),
        st.floats(0.1, 6.0),
        st.builds(Requests, st.integers(0, 3), st.integers(0, 1)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(SEGMENTS, st.integers(1, 30), st.tuples(st.integers(0, 8), st.integers(0, 8)), st.sampled_from([0.0, 0.05]))
def test_whatever_the_day_brings(
    day: list[tuple[str, float, Requests]], ticks: int, late: tuple[int, int], budget: float
) -> None:
    """The books add up, no two leases overlap, and none is used for more than the micro-batch in which it ended."""
    world = World(2, ticks, late, budget)
    for what, seconds, requests in day:
        engine = world.engines[0]
        if what in ("die", "restart"):
            engine.alive = what == "restart"
            engine.restart()
        elif what == "kill trainer":
            world.kill_trainer()
        elif what == "restart trainer" and not world.trainer_alive:
            world.restart_trainer()
        elif what in ("give back", "want") and world.trainer_alive:
            for permit in world.permits:
                permit.give_back() if what == "give back" else permit.want()
        world.run(seconds, requests if what == "load" else NONE)
        check_books(world)
        kinds = world.kinds()
        assert UNDER_LOAD not in kinds or budget
        traces = [permit.trace.rows() for permit in world.permits]
        assert all(delay.micro_batches <= 1 for rows in traces for delay in delays(rows, LOAD))
    world.run(world.ledger._rules.seconds + 1, Requests(1, 1))
    assert world.ledger.lease is None, "waiting requests end every lease beside them"
    leased = sum(0.5 for _, lease in world.in_force if lease)
    assert world.ledger.accounts.seconds == pytest.approx(leased, abs=0.5 * (1 + world.ledger.accounts.ended))


def test_rules_are_consistent() -> None:
    with pytest.raises(AssertionError):
        LeaseRules(idle_above=0.2)
