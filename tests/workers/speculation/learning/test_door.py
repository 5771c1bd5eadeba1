"""What was captured, through real sockets: who hears it, who does not, and that nobody is held up."""

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import psutil
import pytest
import torch
import zmq

from stepladder import LLM, SamplingParams
from stepladder.workers.curve import authenticate
from stepladder.workers.executor import Executor
from stepladder.workers.speculation.learning import door as module
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.learning.door import DOOR, MESSAGE, READER, LessonDoor, LessonReader
from stepladder.workers.speculation.learning.lessons import Captured
from stepladder.workers.speculation.learning.ring import Ring
from stepladder.workers.speculation.learning.wire import Ask, encode, unpack
from tests.workers.speculation.learning.captures import by_request, check, lesson
from tests.workers.speculation.learning.test_wire import NAN, header, sent
from tests.workers.speculation.serving import Texts, requests, serve
from tests.workers.speculation.test_coupled import Fickle

pytestmark = pytest.mark.timeout(60)
SECRET, HOST = "known to both sides", "127.0.0.1"
ALL, LONG = 1 << 30, 20.0


@contextmanager
def opened(*rings: Ring, secret: str = SECRET) -> Iterator[tuple[list[LessonDoor], LessonReader]]:
    """Doors of these rings, and a reader that looks at them."""
    doors, reader = [LessonDoor(ring, HOST, SECRET) for ring in rings], LessonReader(secret)
    reader.look_at(tuple(door.address for door in doors))
    try:
        yield doors, reader
    finally:
        reader.close()
        for door in doors:
            door.close()


@contextmanager
def peer(address: str, secret: str = SECRET, role: str = READER) -> Iterator[zmq.Socket]:
    """A reader that keeps to no rule."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(1)
        authenticate(socket, secret, role=role, server=DOOR)
        socket.connect(address)
        yield socket


def piece(domain: str = "", request: int = 1, tokens: int = 10, hidden: int = 4) -> Captured:
    return Captured(domain, request, lesson(tokens, hidden, [tokens // 2]))


def filled(*several: Captured) -> Ring:
    ring = Ring(1 << 30)
    for one in several:
        ring.put(one)
    return ring


def same(a: Captured, b: Captured) -> bool:
    tensors = zip(a.lesson, b.lesson, strict=True)
    return a[:2] == b[:2] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)


def test_what_an_engine_wrote_arrives(executor: Executor, plain: Texts) -> None:
    """While it writes; what comes is what went."""
    ring, told = Ring(1 << 30), list[Captured]()

    def give(captured: Captured) -> None:
        told.append(captured)
        ring.put(captured)

    with opened(ring) as (_, reader):
        found = list[Captured]()
        thread = threading.Thread(
            target=lambda: serve(executor, requests(), Fickle(plain), 4, Capture(give, 8)), daemon=True
        )
        thread.start()
        while thread.is_alive():
            found += reader.read(ALL, LONG)
        found += reader.read(ALL, LONG)
    check(found, requests(), plain)
    joined, other = by_request(found), by_request(told)
    for number, one in joined.items():
        assert torch.equal(one.states, other[number].states) and torch.equal(one.wrong, other[number].wrong)


def test_of_the_bundled_model() -> None:
    llm, ring = LLM("launch/demo_model", "cpu"), Ring(1 << 30)
    llm.engine.capture = Capture(ring.put)
    done = llm.generate(["def f(", "import "], SamplingParams(max_tokens=100, temperature=0.0))
    with opened(ring) as (_, reader):
        found = by_request(reader.read(ALL, LONG))
    assert {tuple(one.tokens.tolist()) for one in found.values()} == {tuple(one.tokens) for one in done}
    hidden = llm.engine.executor.model.spec.hidden_size
    assert {one.states.shape[1] for one in found.values()} == {hidden}


def test_of_several_engines_as_much_as_was_asked_for() -> None:
    several = [piece(f"d{n % 2}", n) for n in range(30)]
    rings = [filled(*several[first::3]) for first in range(3)]
    with opened(*rings) as (_, reader):
        found = [reader.read(95, LONG) for _ in range(3)]
        assert [len(some) for some in found] == [9, 9, 9]
        found.append(reader.read(1, LONG))
        assert len(found[-1]) == 1, "one at least"
        found.append(reader.read(ALL, LONG))
        assert reader.read(ALL, LONG) == [] and not any(ring.stats.held_bytes for ring in rings)
    arrived = sorted((one for some in found for one in some), key=lambda one: one.request)
    assert len(arrived) == 30 and all(same(a, b) for a, b in zip(several, arrived, strict=True))


def test_messages_are_bounded() -> None:
    """What is large comes in many; a piece that is larger than a message comes alone."""
    small, large = piece("a", 1, 64, 1024), piece("b", 2, 64, 16384)
    ring = filled(*[small] * 40, large)
    with opened(ring) as (doors, _), peer(doors[0].address) as socket:
        sizes, left = list[int](), True
        while left:
            socket.send(encode(Ask(1, ALL)))
            frames = socket.recv_multipart()
            left = unpack(frames)[0].more
            sizes.append(sum(map(len, frames)))
        assert len(sizes) > 5 and sum(size > MESSAGE for size in sizes) == 1
        assert ring.take(1) == []


def test_nobody_without_the_secret_is_heard() -> None:
    ring = filled(piece())
    with opened(ring, secret="guessed") as (doors, stranger):
        began = monotonic()
        assert stranger.read(ALL, 0.3) == [] and 0.3 <= monotonic() - began < 5
        with peer(doors[0].address, role="gateway") as gateway:
            gateway.send(encode(Ask(1, ALL)))
            assert not gateway.poll(300), "another role of the same deployment"
        with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
            plain.setsockopt(zmq.LINGER, 0)
            plain.connect(doors[0].address)
            plain.send(encode(Ask(1, ALL)))
            assert not plain.poll(300)
        assert ring.stats.held_bytes
        friend = LessonReader(SECRET)
        friend.look_at((doors[0].address,))
        assert len(friend.read(ALL, LONG)) == 1
        friend.close()


def test_a_door_that_is_gone_and_one_that_is_left() -> None:
    """Nobody hangs; what others have arrives."""
    first, second = filled(piece("a", 1)), filled(piece("b", 2), piece("b", 3))
    with opened(first, second) as (doors, reader):
        doors[0].close()
        began = monotonic()
        assert [one.request for one in reader.read(ALL, 0.5)] == [2, 3] and 0.4 < monotonic() - began < 5
        reader.look_at((doors[1].address,))
        second.put(piece("b", 4))
        began = monotonic()
        assert [one.request for one in reader.read(ALL, LONG)] == [4] and monotonic() - began < 5, (
            "nobody is waited for"
        )
        reader.look_at(())
        second.put(piece("b", 5))
        assert reader.read(ALL, LONG) == [] and second.stats.held_bytes
        doors[0] = LessonDoor(first, HOST, SECRET)
        reader.look_at((doors[0].address, doors[1].address))
        assert sorted(one.request for one in reader.read(ALL, LONG)) == [1, 5]


def test_a_question_that_was_lost_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    ring = filled(piece("a", 1))
    answer, lost = LessonDoor._answer, list[Ask]()

    def deaf(door: LessonDoor, peer: bytes, ask: Ask) -> None:
        lost.append(ask)
        if len(lost) > 2:
            answer(door, peer, ask)

    monkeypatch.setattr(LessonDoor, "_answer", deaf)
    with opened(ring) as (_, reader):
        assert [one.request for one in reader.read(ALL, LONG)] == [1]
        assert [ask.number for ask in lost[:3]] == [1, 2, 3]


def test_what_comes_late_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    go, answer = threading.Event(), LessonDoor._answer

    def slow(door: LessonDoor, peer: bytes, ask: Ask) -> None:
        go.wait(LONG)
        answer(door, peer, ask)

    monkeypatch.setattr(LessonDoor, "_answer", slow)
    with opened(filled(piece("a", 1))) as (_, reader):
        assert reader.read(ALL, 0.2) == []
        go.set()
        assert [one.request for one in reader.read(ALL, LONG)] == [1]


@pytest.mark.parametrize("reads", [False, True])
def test_no_reader_makes_memory_grow(reads: bool) -> None:
    """Nor one that asks again and again and never reads; others are heard meanwhile."""
    ring, process = Ring(1 << 30), psutil.Process()
    with opened(ring) as (doors, reader), peer(doors[0].address) as lazy:

        def pass_on() -> None:
            ring.put(piece("a", 1, 64, 8192))  # 1 MiB
            if reads:
                assert len(reader.read(ALL, LONG)) == 1
                return
            lazy.send(encode(Ask(1, ALL)))
            while ring.stats.held_bytes:
                threading.Event().wait(0.001)

        for _ in range(60):
            pass_on()
        gc.collect()
        before = process.memory_info().rss
        for _ in range(240):
            pass_on()
        gc.collect()
        assert process.memory_info().rss - before < 60 << 20
        ring.put(piece("a", 2))
        assert [one.request for one in reader.read(ALL, LONG)] == [2]


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"\xff" * 50], [b"\x91" * 900], [encode(Ask(1, 5)), b"more"], [encode(["ask", 1, -5])], [b"x" * 100_000]],
    ids=lambda frames: f"{len(frames)} {frames[0][:6]!r}",
)
def test_garbage_at_the_door_is_dropped(frames: list[bytes]) -> None:
    ring = filled(piece("a", 1))
    with opened(ring) as (doors, reader):
        with peer(doors[0].address) as socket:
            socket.send_multipart(frames)
            assert not socket.poll(200)
        assert len(reader.read(ALL, LONG)) == 1 and doors[0]._thread.is_alive()


def test_a_reader_survives_a_door_that_speaks_nonsense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line each time, and the other door is heard."""
    rings = filled(piece("a", 1)), filled(piece("b", 2))
    answer = LessonDoor._answer

    def mad(door: LessonDoor, peer: bytes, ask: Ask) -> None:
        if door._ring is rings[0]:
            door._socket.send_multipart([peer, *sent(header(), NAN)])
        else:
            answer(door, peer, ask)

    monkeypatch.setattr(LessonDoor, "_answer", mad)
    with opened(*rings) as (_, reader), caplog.at_level(logging.WARNING):
        assert [one.request for one in reader.read(ALL, LONG)] == [2]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "states are not finite" in caplog.text


def test_a_door_that_fails_is_told_once_and_felt_by_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(door: LessonDoor, peer: bytes, ask: Ask) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(LessonDoor, "_answer", broken)
    ring = filled(piece())
    with opened(ring) as (doors, reader):
        assert reader.read(ALL, 0.3) == []
        doors[0]._thread.join(LONG)
        ring.put(piece())
    assert caplog.text.count("the door for lessons has failed") == 1


def test_closing_leaves_no_thread_and_no_socket() -> None:
    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name == DOOR}

    files = open_files()
    for _ in range(20):
        with opened(filled(piece())) as (_, reader):
            reader.read(ALL, LONG)
    assert not threads()
    assert open_files() < files + 20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("readers", [0, 1])
def test_a_step_does_not_wait_for_the_door(executor: Executor, plain: Texts, readers: int) -> None:
    """With and without a reader, whole or dead, texts are the same."""
    ring = Ring(200_000)
    with opened(ring) as (_, reader):
        stop, read = threading.Event(), list[Captured]()

        def greedy() -> None:
            while not stop.is_set():
                read.extend(reader.read(ALL, 0.05))

        thread = threading.Thread(target=greedy)
        if readers:
            thread.start()
        texts, _ = serve(executor, requests(), Fickle(plain), 4, Capture(ring.put, 4))
        stop.set()
        if readers:
            thread.join()
        assert texts == plain
        found = sum(len(one.lesson.tokens) for one in [*read, *reader.read(ALL, LONG)])
    assert found + ring.stats.dropped_tokens == ring.stats.captured_tokens == sum(len(t[0]) for t in plain.values())
