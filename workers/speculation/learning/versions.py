"""The versions of one drafter on disk: a folder per number, which is there whole or not at all.

    7/drafter.json, 7/drafter.safetensors    a version, as `head/files.py` has it
    given/8                                  an empty file: the number 8 is somebody's; the highest one stays for ever
    8.partial, 3.gone                        being written, being removed; leavings after a crash

Writers and readers may be processes on several machines that see the folder.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from stepladder.parallel.spec import ModelSpec
from stepladder.workers.speculation.head.files import (
    MANIFEST,
    WEIGHTS,
    DataWindow,
    Head,
    Manifest,
    read_head,
    read_manifest,
    write_head,
)  # fmt: skip

__all__ = ["VersionInfo", "Versions"]

GIVEN, PARTIAL, GONE = "given", ".partial", ".gone"
STALE_SECONDS = 3600.0  # nobody writes a version for so long
SPARE = 16  # the highest numbers given stay, so that a slow reader of the folder sees some of them


class VersionInfo(NamedTuple):
    """What can be said of a version without reading its weights.

    Attributes:
        number: its own. parent: the one that it was taught from; 0, none.
        scores: how it was judged, by name. window: what it was taught with.
        bytes: of its files. made: Unix time, in seconds.
    """

    number: int
    parent: int
    scores: dict[str, float]
    window: DataWindow
    bytes: int
    made: float


class Versions:
    """Numbers only grow: none is given twice, whoever has died and whatever was removed.

    Args:
        directory: where they lie; made when the first one is published.
        keep: versions that `prune` leaves, the newest ones.
        clock: Unix time, in seconds.
    """

    def __init__(self, directory: Path, keep: int = 5, clock: Callable[[], float] = time.time) -> None:
        assert keep >= 1
        self.directory, self._keep, self._clock = Path(directory), keep, clock

    def folder(self, number: int) -> Path:
        """Where a version lies; a drafter's `speculate.model`."""
        return self.directory / str(number)

    def publish(self, head: Head) -> int:
        """Write a head as the next version. Its manifest says what it was taught from; the number and the time are
        given here.

        Returns:
            Its number, once it is on the disk.

        Raises:
            ValueError: the head is not fit for it.
            OSError: the disk does not take it; nothing of it is left.
        """
        if not head.net.is_finite() or not all(map(math.isfinite, head.manifest.scores.values())):
            raise ValueError("a version of the drafter was not published: it holds numbers that are not finite")
        made: list[Path] = []
        try:
            self._sweep()
            number = self._take_number(above=head.manifest.parent)
            made = [partial := self.directory / f"{number}{PARTIAL}", self.folder(number)]
            write_head(replace(head, manifest=replace(head.manifest, version=number, made=self._clock())), partial)
            _on_disk(partial)
            partial.rename(made[1])
            _on_disk(self.directory)
        except OSError as error:
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
            why = f"{self.directory} cannot be written: {error.strerror or error}"
            raise OSError(f"a version of the drafter was not published: {why}") from error
        return number

    def read(self, number: int, target: str | Path, spec: ModelSpec) -> Head:
        """A version, for the checkpoint `target`.

        Raises:
            ValueError: it is not there, damaged, of another model, or not the version that its place says.
        """
        home, name = self.folder(number), f"version {number} of the drafter in {self.directory}"
        if not home.is_dir():
            raise ValueError(f"{name} is not there; there are {self._numbers_there()}")
        head = read_head(home, target, spec, name)
        if why := _misplaced(number, head.manifest):
            raise ValueError(f"{name}; {why}")
        return head

    def listed(self) -> list[VersionInfo]:
        """Those that are whole, as far as their manifests tell, oldest first."""
        return [info for number in sorted(self._folders()) if (info := self._info(number))]

    def prune(self, keep: set[int]) -> None:
        """Remove all but the newest ones and those of `keep`. What is no version of ours stays."""
        numbers = [info.number for info in self.listed()]
        for number in set(numbers[: -self._keep]) - keep:
            with suppress(OSError):  # the next time, then
                self.folder(number).rename(self.directory / f"{number}{GONE}")
        self._sweep()

    def _take_number(self, above: int) -> int:
        """One that nobody had or will have: whoever creates its file and then still has the highest one. A number that
        is given up is lost."""
        given = self.directory / GIVEN
        given.mkdir(parents=True, exist_ok=True)
        while True:
            number = 1 + max([above, *_numbers(given), *self._folders()])
            with suppress(FileExistsError):
                os.close(os.open(given / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                _on_disk(given)
                if number == max([*_numbers(given), *self._folders()]):
                    return number

    def _sweep(self) -> None:
        """Remove what was left half-done, and low numbers."""
        with suppress(OSError):
            for path in [*self.directory.glob(f"*{PARTIAL}"), *self.directory.glob(f"*{GONE}")]:
                if path.suffix == GONE or self._clock() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            for number in sorted(_numbers(self.directory / GIVEN))[:-SPARE]:
                (self.directory / GIVEN / str(number)).unlink(missing_ok=True)

    def _folders(self) -> list[int]:
        return [number for number in _numbers(self.directory) if self.folder(number).is_dir()]

    def _numbers_there(self) -> str:
        return ", ".join(str(info.number) for info in self.listed()) or "none"

    def _info(self, number: int) -> VersionInfo | None:
        home = self.folder(number)
        try:
            manifest = read_manifest(home)
            size = sum((home / name).stat().st_size for name in (MANIFEST, WEIGHTS))
        except (OSError, ValueError, TypeError):
            return None
        if _misplaced(number, manifest):
            return None
        return VersionInfo(number, manifest.parent, manifest.scores, manifest.window, size, manifest.made)


def _misplaced(number: int, manifest: Manifest) -> str | None:
    """Why a manifest cannot be that of the version `number`."""
    if manifest.version != number:
        return f"its files are those of version {manifest.version}"
    if manifest.parent >= number:
        return f"it says that it was taught from version {manifest.parent}, which is no earlier one"
    return None if manifest.sha256 else "its manifest has no hash of the weights"


def _numbers(directory: Path) -> Iterator[int]:
    """Names in a folder that are numbers, as we write them."""
    if directory.is_dir():
        yield from (int(name) for name in os.listdir(directory) if name.isdecimal() and str(int(name)) == name)


def _on_disk(directory: Path) -> None:
    """The names in a folder are on the disk from here."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
