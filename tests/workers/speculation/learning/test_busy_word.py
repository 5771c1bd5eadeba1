"""The word beside an engine: seen by another process at once, and no veto of anybody who is not there."""

import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from stepladder.workers.speculation.learning import busy_word
from stepladder.workers.speculation.learning.busy_word import BusyWord, BusyWords, remove_leftovers, word_name

NAME = word_name("tests/3/engine-0", "secret")

WRITER = f"""
import sys
from pathlib import Path
from stepladder.workers.speculation.learning.busy_word import BusyWord
word = BusyWord({NAME!r}, Path(sys.argv[1]))
print("made", flush=True)
for line in sys.stdin:
    word.set(*map(int, line.split()))
    print("set", flush=True)
"""


@pytest.fixture
def words(tmp_path: Path) -> Iterator[BusyWords]:
    words = BusyWords(tmp_path)
    words.look_at([NAME])
    yield words
    words.close()


@contextmanager
def writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process with a word here; it sets what it is told."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "made\n"
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], numbers: str) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(f"{numbers}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "set\n"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Readers look whether writers live each time, or (with other seconds) hardly ever."""
    monkeypatch.setattr(busy_word, "LOOK_SECONDS", 0.0)
    return lambda seconds: monkeypatch.setattr(busy_word, "LOOK_SECONDS", seconds)


def test_another_process_is_heard_at_once(tmp_path: Path) -> None:
    words = BusyWords(tmp_path)
    with writer(tmp_path) as process:
        words.look_at([NAME])
        assert words.read()[:2] == (0, 0)
        before = monotonic()
        tell(process, "5 2")
        word = words.read()
        assert word[:2] == (5, 2) and before <= word.since <= monotonic()
        tell(process, "4 0")
        assert words.read() == (4, 0, word.since), "it has had work all the time"
        tell(process, "0 0")
        tell(process, "1 0")
        assert words.read().since > word.since
    words.close()


def test_an_absent_word_is_no_veto_and_is_seen_when_it_comes(tmp_path: Path, words: BusyWords, at_once: object) -> None:
    assert words.read() == (0, 0, 0.0)
    word = BusyWord(NAME, tmp_path)
    word.set(1)
    assert words.read().requests == 1
    words.look_at([])
    assert words.read().requests == 0
    words.look_at([NAME])
    assert words.read().requests == 1
    word.close()
    word.close()
    assert words.read().requests == 0 and not list(tmp_path.iterdir())


def test_a_killed_writer_vetoes_nothing_and_the_next_removes_its_word(
    tmp_path: Path, words: BusyWords, at_once: Callable[[float], None]
) -> None:
    with writer(tmp_path) as process:
        tell(process, "3")
        assert words.read().requests == 3
        at_once(3600)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert words.read().requests == 3, "nobody has looked"
        at_once(0)
        assert words.read().requests == 0
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    other = BusyWord(word_name("tests/4/engine-0", "secret"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [word_name("tests/4/engine-0", "secret")]
    other.close()


def test_only_words_of_the_dead_are_leftovers(tmp_path: Path) -> None:
    word, foreign = BusyWord(NAME, tmp_path), tmp_path / "something else"
    foreign.write_text("")
    for name in ("half-made", "old"):
        (tmp_path / f"{busy_word.PREFIX}{name}").write_bytes(bytes(16))
    (tmp_path / f"{busy_word.PREFIX}link").symlink_to(foreign)
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {NAME, "something else", f"{busy_word.PREFIX}link"}
    word.close()


def test_a_word_of_the_same_name_is_replaced_and_its_late_writer_removes_nothing(
    tmp_path: Path, words: BusyWords, at_once: object
) -> None:
    old = BusyWord(NAME, tmp_path)
    old.set(1)
    assert words.read().requests == 1
    new = BusyWord(NAME, tmp_path)
    old.close()
    assert words.read().requests == 0
    new.set(2, 1)
    assert words.read()[:2] == (2, 1)
    new.close()


def test_several_engines_add_up(tmp_path: Path) -> None:
    names = [word_name(f"tests/1/engine-{index}", "secret") for index in range(2)]
    first, second = (BusyWord(name, tmp_path) for name in names)
    words = BusyWords(tmp_path)
    words.look_at([*names, word_name("tests/1/engine-2", "secret")])
    first.set(2, 1)
    second.set(3, 2**40)
    assert words.read()[:2] == (5, 1 + 2**32 - 1)
    for one in (words, first, second):
        one.close()


def test_only_this_user_can_read_it(tmp_path: Path) -> None:
    word = BusyWord(NAME, tmp_path)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    word.close()


def test_a_folder_without_room_costs_the_word_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    word = BusyWord(NAME, tmp_path / "nowhere")
    word.set(1)
    word.close()
    (told,) = caplog.messages
    assert told.startswith(f"{tmp_path / 'nowhere' / NAME} cannot be made (No such file or directory); ")


def test_a_file_that_is_no_word_is_none(tmp_path: Path, words: BusyWords, at_once: object) -> None:
    (tmp_path / NAME).write_bytes(b"")
    assert words.read().requests == 0
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/dev/zero")
    assert words.read().requests == 0


def test_names_are_told_apart() -> None:
    long = "x" * 300
    names = {word_name(group, key) for group in ("a/1/e", "a/11/e", "a_1/e", f"{long}1", f"{long}2") for key in "ab"}
    assert len(names) == 10 and all(len(name) < 255 and "/" not in name for name in names)


def test_setting_and_reading_ask_the_system_for_nothing(
    tmp_path: Path, words: BusyWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But once a second, whether the writers live."""
    word = BusyWord(NAME, tmp_path)
    words.look_at([NAME])
    monkeypatch.setattr(busy_word, "LOOK_SECONDS", 3600.0)
    words.read()
    with monkeypatch.context() as nothing:
        for module in ("os", "fcntl", "mmap"):
            nothing.setattr(busy_word, module, None)
        for number in range(1000):
            word.set(number % 3, number % 2)
            assert words.read()[:2] == (number % 3, number % 2)
        nothing.setattr(busy_word, "LOOK_SECONDS", 0.0)
        with pytest.raises(AttributeError):
            words.read()
    word.close()
