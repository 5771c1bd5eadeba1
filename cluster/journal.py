"""What a restarted controller must know and cannot ask anybody: a small JSON file, replaced atomically."""

import json
import os
import threading
from pathlib import Path
from typing import Any


class Journal:
    """A mapping on disk. Reading a missing file gives an empty one."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def set(self, **values: Any) -> None:
        """Store values; on return they are on disk, whole."""
        fresh = self._path.with_suffix(".new")
        with self._lock:
            self._values |= values
            fresh.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("w") as file:
                json.dump(self._values, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
