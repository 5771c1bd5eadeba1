"""The clock of a rank: every second of its life is in one of three parts."""

import threading

import pytest
import torch

from stepladder.parallel.clock import Clock, Split
from stepladder.parallel.mesh import Mesh
from tests.ranks import run_ranks


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_second_is_counted_once() -> None:
    time = Time()
    clock = Clock(time)
    time.now += 1
    with clock.waiting:
        time.now += 2
        with clock.idle:
            time.now += 4
            with clock.waiting:
                time.now += 8
        time.now += 16
    time.now += 32
    assert clock.split() == Split(busy=33, waiting=26, idle=4) and sum(clock.split()) == time.now - 100


def test_a_state_that_lasts_is_seen_from_outside() -> None:
    time = Time()
    clock = Clock(time)
    with clock.idle:
        time.now += 5
        assert clock.split() == Split(idle=5)
        time.now += 1
        assert clock.split() == Split(idle=6)


def test_an_error_ends_a_state() -> None:
    time = Time()
    clock = Clock(time)
    with pytest.raises(RuntimeError), clock.waiting:
        raise RuntimeError
    time.now += 3
    assert clock.split() == Split(busy=3)


def test_the_past_is_forgotten() -> None:
    time = Time()
    clock = Clock(time)
    time.now += 3
    clock.restart()
    assert clock.split() == Split()


def test_waiting_for_a_peer_is_waiting() -> None:
    """One rank comes late to a reduce; the other waits for it, and neither is idle."""

    def rank_main(mesh: Mesh) -> Split:
        mesh.clock.restart()
        if mesh.shard.rank:
            threading.Event().wait(0.4)
        mesh.all_reduce(torch.ones(4)).wait()
        return mesh.clock.split()

    punctual, late = run_ranks(2, rank_main)
    assert punctual.waiting > 0.3 and late.waiting < 0.3 and punctual.idle == late.idle == 0
