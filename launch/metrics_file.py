"""A deployment's figures over time, as its metrics.jsonl has them; a row that is being written does not count."""

import json
from pathlib import Path


def rows(path: Path) -> list[dict[str, float]]:
    """All, oldest first."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def newest(path: Path) -> dict[str, float]:
    """The newest value of every figure."""
    return {key: value for row in rows(path) for key, value in row.items()}
