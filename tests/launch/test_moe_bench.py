"""suite=moe: a small run, and its options."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepladder.launch.bench import moe
from stepladder.launch.bench.moe import BATCHED, EAGER, GROUPED, OURS, Case, MoeBench

SMALL = MoeBench(
    name="moe",
    run_dir="",
    shapes=[[32, 24, 4, 2]],
    tokens=[1, 5, 40],
    dtypes=["float32", "bfloat16"],
    batched_below=5,
    repeats=2,
)


def test_all_ways_compute_the_same_and_are_timed(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        report = moe.run(replace(SMALL, run_dir=str(tmp_path)))
    finally:
        torch.set_num_threads(threads)
    ours = [row for row in report.rows if row.metric.startswith(f"{OURS},")]
    assert len(ours) == 6 and all(row.value and row.rival for row in ours)
    assert sum(row.metric.startswith(f"{BATCHED},") for row in report.rows) == 4
    assert report.emulated is None and len(report.summary) == 3


def test_what_it_comes_to() -> None:
    times = {GROUPED: 1.0, EAGER: 2.0}
    cases = {Case((8, 8, 4, 2), "float32", tokens): {OURS: ours} | times for tokens, ours in ((1, 0.5), (4, 1.3))}
    mean, worst, eager = moe.report(cases).summary.values()
    assert mean.value == pytest.approx(math.sqrt(0.65)) and mean.holds
    assert (worst.value, worst.holds) == (1.3, True) and (eager.value, eager.holds) == (0.65, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shapes": [[8, 8, 2, 3]]}, "each is hidden, inner, experts and experts per token"),
        ({"shapes": [[8, 8, 2]]}, "each is hidden, inner, experts and experts per token"),
        ({"tokens": [0]}, "each must be at least 1"),
        ({"dtypes": ["float64"]}, "each must be float32 or bfloat16"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **options)  # type: ignore[arg-type]
