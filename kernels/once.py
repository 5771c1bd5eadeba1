"""Folders of a cache, each made once, whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

CACHE = "~/.cache/stepladder/models"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, after `make` has filled it if it was not there.

    Whoever comes meanwhile, from any process of the machine, waits until it is done. If `make` fails or is killed,
    nothing is there, and the next one begins anew.

    Args:
        make: fills an empty folder beside it, on the same disk.

    Raises:
        ValueError: the cache cannot be written; the sentence names it. And whatever `make` raises.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, also by being killed
            if not folder.is_dir():
                _make(partial, make)
                os.rename(partial, folder)
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder.parent} cannot be used: {error.strerror or error}; choose another folder for "
            "models with model.cache, or free some space"
        ) from None
    return folder


def _make(partial: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed: the lock is ours
    partial.mkdir()
    try:
        make(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
