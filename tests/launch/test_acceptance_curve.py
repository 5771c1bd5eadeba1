"""The curve that `make demo` ends with: read, told, drawn."""

import json
from pathlib import Path
from typing import Any

import pytest

from stepladder.launch.acceptance_curve import Curve, Point
from stepladder.launch.report import drawn


def row(seconds: float, acceptance: float, version: int) -> dict[str, Any]:
    return {
        "serve/seconds": seconds, "spec/acceptance": acceptance, "spec/accepted_length": 1 + acceptance,
        "drafter/version": version,
    }  # fmt: skip


@pytest.fixture
def rising() -> Curve:
    """.6 until the change after 10 s, .1 for 20 s, then up to .7."""
    points = [Point(float(t), 0.6, 1.6, 1) for t in range(-10, 1)]
    points += [Point(float(t), 0.1, 1.1, 1) for t in range(1, 20)]
    return Curve([*points, *(Point(float(t), 0.4, 1.4, 2) for t in range(20, 40)), Point(50.0, 0.7, 2.0, 3)])


def test_it_is_read_from_the_figures_of_a_deployment(tmp_path: Path) -> None:
    """Rows without the figure, before there is a version, are no points; nor is one that is being written."""
    found = [{"serve/seconds": 1.0}, row(12.0, 0.5, 1), row(14.5, 0.25, 2), row(15.0, 0.75, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, found))[:-5])
    curve = Curve.read(path, changed=14.0)
    assert curve.points == [Point(-2.0, 0.5, 1.5, 1), Point(0.5, 0.25, 1.25, 2)]
    assert curve.swaps == [*curve.points], "the first one, and another"


def test_it_is_told_in_a_sentence(rising: Curve) -> None:
    assert rising.told() == (
        "acceptance: 0.60 (1.60 tokens per step with a draft) before the change, 0.10 (1.10 tokens per step with a "
        "draft) 1 s after it, 0.70 (2.00 tokens per step with a draft) in the end; "
        "versions that became live after it: 2"
    )


def test_a_terminal_shows_it(rising: Curve) -> None:
    """A column is a second, the range is 60 s; a star lies in the tenth that it is in, its upper bound included."""
    lines = rising.text().splitlines()
    assert len(lines) == 13 and max(map(len, lines)) == 66
    assert lines[0] == " 1.0 |" + " " * 10 + "|"
    assert lines[3] == "     |" + " " * 10 + "|" + " " * 48 + "*", "0.7, at the end"
    assert lines[4] == "     |" + "*" * 11, "0.6"
    assert lines[6] == "     |" + " " * 10 + "|" + " " * 19 + "*" * 20, "0.4"
    assert lines[9] == "     |" + " " * 10 + "|" + "*" * 19, "0.1"
    assert lines[10] == " 0.0 +" + "-" * 60
    assert lines[11] == " " * 6 + "^" + " " * 29 + "^" + " " * 28 + "^"
    assert lines[12] == " " * 6 + "-10 s" + " " * 50 + "+50 s"


def test_a_picture_is_a_png(rising: Curve, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert drawn(rising.draw, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_without_figures_nothing_fails(tmp_path: Path) -> None:
    nothing = Curve([])
    assert nothing.text() == "(there is no figure of the drafter's acceptance)" and nothing.swaps == []
    assert nothing.told() == "acceptance: the drafter has foreseen nothing since the traffic changed"
    flat = Curve([Point(3.0, 0.0, None, 0)])
    assert flat.told() == "acceptance: 0.00 3 s after it, 0.00 in the end; versions that became live after it: 0"
    assert flat.text().splitlines()[9] == "     |*", "no change to be seen, and one moment"
