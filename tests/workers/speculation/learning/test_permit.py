"""Before each micro-batch all ranks go or all stop; what ends a lease, ends training after one micro-batch at most."""

import json
import multiprocessing
import threading
from collections import Counter
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from stepladder.parallel.mesh import gloo_group
from stepladder.parallel.rendezvous import open_store
from stepladder.workers.speculation.learning.busy_word import Word
from stepladder.workers.speculation.learning.lease import GAPS, SPARE, UNDER_LOAD, Kind, Lease, LeaseNotice, Use
from stepladder.workers.speculation.learning.lease_trace import (
    END,
    LEASE,
    LOAD,
    MICRO_BATCH,
    Delay,
    Row,
    chrome_events,
    delays,
    read_trace,
    trace_path,
    write_trace,
)
from stepladder.workers.speculation.learning.permit import Permit, least_over


class Machine:
    """Its clocks and the word on it."""

    def __init__(self) -> None:
        self.now, self.cpu, self.word = 1000.0, 0.0, Word()
        self.permit = Permit(word=lambda: self.word, now=lambda: self.now, cpu=lambda: self.cpu)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.cpu += seconds / 2

    def train(self, seconds: float = 1.0) -> bool:
        """Whether a micro-batch was allowed; it takes so long."""
        if not self.permit.go():
            return False
        with self.permit.micro_batch():
            self.pass_by(seconds)
        return True


@pytest.fixture
def machine() -> Machine:
    return Machine()


def notice(serial: int, number: int, seconds: float = 10.0, micro_batches: int = 100, kind: Kind = GAPS) -> LeaseNotice:
    """The deadline is on a clock that this machine does not know."""
    return LeaseNotice(serial, Lease(number, "trainer", 1, 5.0, micro_batches, kind, seconds))


def test_nothing_is_trained_without_a_lease(machine: Machine) -> None:
    assert not machine.train()
    machine.permit.hear(notice(1, 1))
    assert machine.train() and machine.permit.use() == Use(1, 1, 1, 0.5)
    machine.permit.hear(LeaseNotice(2, None))
    assert not machine.train() and machine.permit.use() == Use(2, 1, 1, 0.5)


def test_a_lease_ends_by_the_clock_of_this_machine(machine: Machine) -> None:
    machine.permit.hear(notice(1, 1, seconds=2.5))
    assert [machine.train() for _ in range(4)] == [True, True, True, False]
    use = machine.permit.use()
    assert (use.micro_batches, use.late_micro_batches, use.late_seconds) == (3, 1, pytest.approx(0.5))
    assert delays(machine.permit.trace.rows(), END) == [Delay(pytest.approx(0.5), 1)]


def test_a_lease_is_renewed_and_used_up(machine: Machine) -> None:
    machine.permit.hear(notice(1, 1, seconds=1.5, micro_batches=2))
    assert machine.train()
    machine.permit.hear(notice(2, 1, seconds=10.0, micro_batches=3))
    assert [machine.train() for _ in range(3)] == [True, True, False]
    assert machine.permit.use() == Use(2, 1, 3, 1.5, returned=True)
    machine.permit.hear(notice(3, 1, micro_batches=9))
    assert not machine.train(), "it has been given back"
    machine.permit.hear(notice(4, 4))
    assert machine.train() and machine.permit.use() == Use(4, 4, 1, 0.5)


def test_a_notice_that_was_overtaken_is_not_heeded(machine: Machine) -> None:
    machine.permit.hear(LeaseNotice(2, None))
    machine.permit.hear(notice(1, 1))
    assert not machine.train() and machine.permit.use().serial == 2


def test_a_revocation_in_the_middle_lets_that_micro_batch_end_and_no_other_begin(machine: Machine) -> None:
    machine.permit.hear(notice(1, 1))
    assert machine.permit.go()
    with machine.permit.micro_batch():
        machine.pass_by(0.4)
        machine.permit.hear(LeaseNotice(2, None))
        assert machine.permit.use() == Use(2, 1, 1, at_work=True)
        machine.pass_by(0.6)
    assert not machine.train()
    assert machine.permit.use() == Use(2, 1, 1, 0.5, 1, pytest.approx(0.6))


@pytest.mark.parametrize(
    ("kind", "running", "waiting"), [(GAPS, False, False), (SPARE, False, False), (UNDER_LOAD, True, False)]
)
def test_the_word_is_a_veto(machine: Machine, kind: Kind, running: bool, waiting: bool) -> None:
    machine.permit.hear(notice(1, 1, kind=kind))
    assert machine.train(0.1)
    machine.word = Word(2, 0, machine.now)
    assert machine.train(0.1) is running
    machine.word = Word(2, 1, machine.now)
    assert machine.train(0.1) is waiting
    machine.word = Word(0, 0, machine.now)
    assert machine.train(0.1), "the lease was in force all the time"


def test_the_trace_tells_how_long_returning_load_waited(machine: Machine) -> None:
    machine.permit.hear(notice(1, 1, seconds=100))
    assert machine.permit.go()
    with machine.permit.micro_batch():
        machine.pass_by(0.3)
        machine.word = Word(1, 0, machine.now)
        machine.pass_by(0.7)
    assert not machine.train()
    machine.pass_by(3.0)
    machine.word = Word(0, 0, machine.word.since)
    assert machine.train() and machine.train()
    machine.word = Word(1, 1, machine.now)
    assert not machine.train()
    rows = machine.permit.trace.rows()
    assert delays(rows) == [Delay(pytest.approx(0.7), 1), Delay(0.0, 0)]
    assert Counter(row.what for row in rows) == {"lease": 1, MICRO_BATCH: 3, LOAD: 2, "quiet": 1}
    first = next(event for event in chrome_events(rows, zero=1000.0) if event["name"] == MICRO_BATCH)
    assert (first["ph"], first["ts"], first["dur"], first["args"]) == (
        "X",
        0.0,
        pytest.approx(1e6),
        {"lease": 1, "kind": GAPS},
    )


def test_training_that_is_meant_to_go_on_beside_requests_is_no_delay() -> None:
    """Only the micro-batch that was under way when load came back is."""
    rows = [
        Row(MICRO_BATCH, 0.0, 1.0, 1, UNDER_LOAD),
        Row(LOAD, 0.75, 0.75, 1),
        Row(MICRO_BATCH, 1.0, 2.0, 1, UNDER_LOAD),
        Row(MICRO_BATCH, 2.0, 3.0, 1, UNDER_LOAD),
        Row("quiet", 3.0, 3.0, 1),
    ]
    assert delays(rows) == [Delay(0.25, 1)]
    gaps = [row._replace(kind=GAPS) for row in rows]
    assert delays(gaps) == [Delay(2.25, 3)], "which must not be"


def test_a_lease_that_is_renewed_after_its_deadline_or_for_load_is_in_the_trace(machine: Machine) -> None:
    """Else what is trained under it would count as an overrun, or as a delay."""
    machine.permit.hear(notice(1, 1, seconds=0.5))
    assert machine.train(0.25)
    machine.pass_by(1.0)
    assert not machine.train()
    machine.permit.hear(notice(2, 1, seconds=100))
    assert machine.train()
    machine.permit.hear(notice(3, 1, seconds=100, kind=UNDER_LOAD))
    machine.word = Word(1, 0, machine.now)
    machine.pass_by(0.25)
    assert machine.train() and machine.train()
    rows = machine.permit.trace.rows()
    assert [row.kind for row in rows if row.what == LEASE] == [GAPS, GAPS, UNDER_LOAD]
    assert [row.kind for row in rows if row.what == MICRO_BATCH] == [GAPS, GAPS, UNDER_LOAD, UNDER_LOAD]
    assert delays(rows, END) == delays(rows) == [Delay(0.0, 0)]


def test_a_trace_is_read_as_it_was_written(machine: Machine, tmp_path: Path) -> None:
    machine.permit.hear(notice(1, 1, seconds=100))
    assert machine.train(0.25)
    machine.word = Word(1, 0, machine.now)
    assert not machine.train()
    machine.permit.hear(LeaseNotice(2, None))
    rows, path = machine.permit.trace.rows(), trace_path(tmp_path / "drafter", 1)
    write_trace(rows, path, 1)
    assert read_trace(path) == [
        row._replace(begin=pytest.approx(row.begin), end=pytest.approx(row.end)) for row in rows
    ]
    assert [one.name for one in path.parent.iterdir()] == ["lease-trace-1.json"]
    names = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "M"]
    assert names == [{"name": "trainer rank 1"}]
    (tmp_path / "drafter" / "lease-trace-2.json").mkdir()
    with pytest.raises(OSError):
        write_trace(rows, trace_path(tmp_path / "drafter", 2), 2)
    assert not list(path.parent.glob("*.partial"))


def test_a_trainer_without_lessons_gives_its_lease_back(machine: Machine) -> None:
    machine.permit.hear(notice(1, 1))
    machine.permit.give_back()
    assert not machine.train() and machine.permit.use() == Use(1, 1, returned=True, wants=False)
    machine.permit.want()
    assert not machine.train() and machine.permit.use() == Use(1, 1, returned=True)
    machine.permit.hear(notice(2, 2))
    assert machine.train()


def test_news_end_a_wait(machine: Machine) -> None:
    heard = threading.Event()

    def wait() -> None:
        while not machine.permit.go():
            machine.permit.wait(60)
        heard.set()

    thread = threading.Thread(target=wait)
    thread.start()
    machine.permit.hear(notice(1, 1))
    thread.join(10)
    assert heard.is_set()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("train"), st.floats(0.01, 3)),
            st.tuples(st.just("pass"), st.floats(0, 5)),
            st.tuples(st.just("lease"), st.floats(0.1, 8)),
            st.tuples(st.just("revoke"), st.just(0.0)),
            st.tuples(st.just("word"), st.sampled_from([0.0, 1.0])),
        ),
        max_size=60,
    )
)
def test_whatever_happens_at_most_one_micro_batch_is_late(steps: list[tuple[str, float]]) -> None:
    """Also where the news come in the middle of one."""
    machine, serial = Machine(), 0
    waiting: list[tuple[str, float]] = []

    def obey(what: str, value: float) -> None:
        nonlocal serial
        if what == "pass":
            machine.pass_by(value)
        elif what == "word":
            since = machine.now if value and not machine.word.requests else machine.word.since
            machine.word = Word(int(value), 0, since)
        elif what in ("lease", "revoke"):
            serial += 1
            machine.permit.hear(notice(serial, serial, value) if what == "lease" else LeaseNotice(serial, None))

    for what, value in steps:
        if what != "train":
            waiting.append((what, value))
            if len(waiting) > 2:  # the others come while something is trained
                obey(*waiting.pop(0))
        elif machine.permit.go():
            assert not machine.word.requests
            with machine.permit.micro_batch():
                machine.pass_by(value)
                while waiting:
                    obey(*waiting.pop(0))
                machine.pass_by(value)
        rows = machine.permit.trace.rows()
        for after in (END, LOAD):
            assert all(delay.micro_batches <= 1 for delay in delays(rows, after))


def joined(rank: int, port: int) -> dist.ProcessGroup:
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    return gloo_group(dist.PrefixStore("votes", store), rank, 2, "127.0.0.1", timedelta(seconds=30))


def ranks_train(rank: int, port: int, answers: "Queue[tuple[int, list[int], bool]]") -> None:
    """A process of two. Rank 1 hears of the lease at its 20th vote, its word is set from the 40th vote to the 60th, and
    rank 0 leaves at the 100th."""
    group = joined(rank, port)
    words = [Word(int(rank == 1 and 40 <= vote < 60)) for vote in range(101)]
    votes = 0
    permit = Permit(least_over(group), lambda: words[votes])
    if rank == 0:
        permit.hear(notice(1, 1, seconds=600, micro_batches=1000))
    trained: list[int] = []
    while not permit.over:
        if rank == 1 and votes == 20:
            permit.hear(notice(1, 1, seconds=600, micro_batches=1000))
        if rank == 0 and votes == 100:
            permit.leave()
        if permit.go():
            with permit.micro_batch():
                total = torch.ones(1)
                group.allreduce([total]).wait()  # a rank that is here alone would hang
                assert total == 2
            trained.append(votes)
        votes += 1
    answers.put((rank, trained, permit.over))


def test_one_of_two_processes_that_says_stop_stops_both_and_none_hangs() -> None:
    store, context = open_store("127.0.0.1"), multiprocessing.get_context("spawn")
    answers: Queue[tuple[int, list[int], bool]] = context.Queue()
    processes = [context.Process(target=ranks_train, args=(rank, store.port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    went = [*range(20, 40), *range(60, 100)]
    assert found == [(0, went, True), (1, went, True)]


def test_a_lost_rank_ends_the_vote_of_the_others() -> None:
    """They do not wait for ever: the collective fails, and the gang is put back as a whole."""
    store = open_store("127.0.0.1")
    both, done = threading.Barrier(2), threading.Event()

    def rank_main(rank: int) -> None:
        group = joined(rank, store.port)
        both.wait()
        if rank:
            return  # its sockets close with the group
        with pytest.raises(RuntimeError):
            while True:
                Permit(least_over(group)).go()
        done.set()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert done.is_set()
