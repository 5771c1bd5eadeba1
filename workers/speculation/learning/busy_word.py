"""A word in shared memory beside an engine: whether it has work, so that training on the same machine makes way.

Rank 0's loop writes it, the trainer's ranks read it before each micro-batch; neither takes a system call for that. The
writer holds a lock on the file while it lives, which the kernel takes back from a process that was killed: so a word
that nobody writes any more is told from one of an engine that works, and removed by whoever comes next.
"""

import fcntl
import logging
import mmap
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import NamedTuple

log = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
PREFIX = "stepladder-busy-"
SIZE = (
    16  # bytes, two numbers of 64 bits: requests in the engine (low half) and of these waiting (high), and since when
)
HALF = 2**32 - 1
LOOK_SECONDS = 1.0  # how often a reader looks whether words have come, and whether their writers live


class Word(NamedTuple):
    """requests: in the engine. waiting: of these, without a place in a step yet. since: when an engine last got work
    after it had none, in seconds of the machine's monotonic clock; 0 if none ever has."""

    requests: int = 0
    waiting: int = 0
    since: float = 0.0


def word_name(group: str, secret: str) -> str:
    """Of a group's life (deployment/generation/group). Deployments of other Ray clusters on this machine may be called
    the same, but have another secret."""
    readable = re.sub(r"[^\w.-]", "_", group, flags=re.ASCII)[:100]
    return f"{PREFIX}{readable}-{blake2b(group.encode(), key=secret.encode()[:64], digest_size=8).hexdigest()}"


class BusyWord:
    """The writer's end. Words of killed processes, whoever they were of, are removed on the way; one of the same name
    is replaced. Where there is no room for it, the log says so, and training hears of load from the controller only."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self._path, self._file, self._busy = folder / name, -1, False
        try:
            remove_leftovers(folder)
            self._file = _create(self._path)
        except OSError as error:
            log.warning("%s cannot be made (%s); training learns of returning load later", self._path, error.strerror)
        self._map = mmap.mmap(self._file, SIZE)  # of nobody's memory but ours if there is no file
        self._numbers = memoryview(self._map).cast("Q")

    def set(self, requests: int, waiting: int = 0) -> None:
        """What the engine has now; from the thread of its loop only."""
        if requests and not self._busy:
            self._numbers[1] = monotonic_ns()
        self._busy = bool(requests)
        self._numbers[0] = min(requests, HALF) | min(waiting, HALF) << 32

    def close(self) -> None:
        """Nobody is kept from training any more, and the file is gone. May be called again."""
        if self._map.closed:
            return
        self.set(0)
        if self._file >= 0:
            _remove(self._path, self._file)
            os.close(self._file)
        self._numbers.release()
        self._map.close()


class BusyWords:
    """The reader's end: of all engines of a deployment that run on this machine. From one thread."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._readers: dict[str, _Reader | None] = {}
        self._looked = 0.0

    def look_at(self, names: Iterable[str]) -> None:
        """From now on at these. One that is not here (yet), or whose writer has died, keeps nobody from training."""
        names = tuple(names)
        for name in set(self._readers) - set(names):
            if reader := self._readers.pop(name):
                reader.close()
        for name in names:
            if not self._readers.get(name):
                self._readers[name] = _Reader.open(self._folder / name)

    def read(self) -> Word:
        """What all of them have together, and when the last of them got work."""
        if (now := monotonic()) - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look_again()
        words = [reader.word() for reader in self._readers.values() if reader]
        since = max((word.since for word in words), default=0.0)
        return Word(sum(word.requests for word in words), sum(word.waiting for word in words), since)

    def close(self) -> None:
        self.look_at(())

    def _look_again(self) -> None:
        for name, reader in self._readers.items():
            if reader and not reader.is_written():
                reader.close()
                self._readers[name] = None
        self.look_at(self._readers)


class _Reader:
    """One word, mapped for reading."""

    def __init__(self, file: int) -> None:
        self._file, self._map = file, mmap.mmap(file, SIZE, prot=mmap.PROT_READ)
        self._numbers = memoryview(self._map).cast("Q")

    @classmethod
    def open(cls, path: Path) -> "_Reader | None":
        """None if there is none that somebody writes."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            reader = cls(file)
        except (OSError, ValueError):  # not one of ours
            os.close(file)
            return None
        if reader.is_written():
            return reader
        reader.close()
        return None

    def word(self) -> Word:
        number, since = self._numbers[0], self._numbers[1]
        return Word(number & HALF, number >> 32, since * 1e-9)

    def is_written(self) -> bool:
        if not _lock(self._file, fcntl.LOCK_SH):
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        self._numbers.release()
        self._map.close()
        os.close(self._file)


def remove_leftovers(folder: Path = FOLDER) -> None:
    """All words whose writers have died. Those of other users stay."""
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _lock(file, fcntl.LOCK_EX):
                    _remove(path, file)
            finally:
                os.close(file)


def _create(path: Path) -> int:
    """A new file that only this user can read, locked before it has this name."""
    while True:
        file, temporary = tempfile.mkstemp(prefix=PREFIX, dir=path.parent)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.write(file, bytes(SIZE))  # takes the memory now: a page that is not there would end the process later
            os.replace(temporary, path)
            return file
        except OSError as error:
            os.close(file)
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            if not isinstance(error, FileNotFoundError):  # somebody has taken it for a leftover, before it was locked
                raise


def _remove(path: Path, file: int) -> None:
    """Unless the name stands for another file by now."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), os.fstat(file)):
            path.unlink()


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
