"""What a restarted controller must know and cannot ask anybody: a small JSON file, replaced atomically."""

import json
import logging
import os
import threading
from pathlib import Path
from time import time
from typing import Any

log = logging.getLogger(__name__)

LIVES = ("generation of ", "gateway_life")  # numbers in names of processes: none is to be used twice in a folder


class Journal:
    """A mapping on disk, of one deployment.

    Args:
        owner: which deployment. What another one has left in the file is forgotten, but for `LIVES`.

    Attributes:
        resumed: whether this deployment wrote the file, so that processes it tells of are this deployment's.

    Raises:
        ValueError: a new deployment's journal cannot be written.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self._path, self._lock, self._missed = path, threading.Lock(), False
        values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.resumed = values.get("owner") == owner
        if self.resumed:
            self._values = values
            return
        lives = {key: value for key, value in values.items() if key.startswith(LIVES)}
        self._values = lives | {"owner": owner, "began": time()}
        try:
            self._write()
        except OSError as error:
            raise ValueError(f"run_dir: {path} cannot be written: {error.strerror or error}") from None

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def set(self, **values: Any) -> None:
        """Store values; on return they are on disk, whole. A disk that fails later than at first does not end serving:
        it gets them with the next ones, or at `retry`."""
        with self._lock:
            self._values |= values
            try:
                self._write()
                self._missed = False
            except OSError as error:
                if not self._missed:
                    log.error("%s cannot be written (%s); going on without", self._path, error.strerror or error)
                self._missed = True

    def retry(self) -> None:
        """Write what the disk did not take."""
        if self._missed:
            self.set()

    def _write(self) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("w") as file:
            json.dump(self._values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
