"""JSON files that are there whole or not at all, and what an interrupted run finds in them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, whatever kills this process."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def kept(path: Path, settings: Mapping[str, Any], refusal: str) -> Any:
    """What an earlier run wrote to `path`, None if there was none; its `settings` must be these.

    Raises:
        ValueError: they are not; `refusal` says what to do.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["settings"] != json.loads(json.dumps(settings)):  # as JSON gives them back
        raise ValueError(f"{path} {refusal} or choose another run_dir")
    return found
