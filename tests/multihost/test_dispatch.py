"""suite=dispatch on real hosts: three kinds, the same tokens, bytes that were counted, and what a link does to them."""

from pathlib import Path

import pytest

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.dispatch.rank import BROADCAST, HOME, KINDS, TP
from stepladder.launch.report import publish
from tests.composed import composed

SMALL = ["hidden=64", "inner=32", "layers=2", "heads=4", "experts=4", "context=8", "steps=2", "rounds=1"]


@pytest.mark.multihost
@pytest.mark.timeout(120)
def test_three_ways_over_a_link(possible: None, tmp_path: Path) -> None:
    words = [*SMALL, f"run_dir={tmp_path}", "rates=[null,20]", "batches=[12]"]
    options, run = suite_of(composed("bench", "suite=dispatch", *words))
    report = run(options)
    publish(report, ["suite=dispatch"], tmp_path)
    assert (tmp_path / "dispatch.png").stat().st_size > 5_000
    rows = {(row.case, row.metric): row for row in report.rows}
    assert len(report.summary) == 2
    for link in ("unshaped links", "links of 20 Mbit/s"):
        assert rows[f"{link}, batch 12", "sequences that all continue alike"].value == 100
        kilobytes = {kind: rows[f"{link}, batch 12: {kind}", "busiest link"].value for kind in KINDS}
        row = 64 * 4 / 1e3  # of 12, in fp32, of 2 layers; broadcast sends each to two ranks, from attention and x_0
        assert kilobytes[BROADCAST] >= 2 * 12 * (2 + 1) * row
        assert kilobytes[HOME] < kilobytes[BROADCAST] and kilobytes[TP] > 2 * 2 * 12 * row
    for kind in KINDS:
        slow = rows[f"links of 20 Mbit/s, batch 12: {kind}", "TPOT"]
        assert slow.bound and slow.value and slow.value > 0.8 * slow.bound


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("experts=1", "experts is 1; two F ranks need at least 2"),
        ("batches=[1]", "batches of at least 2"),
        ("per_token=9", "num_experts_per_tok is 9"),
        ("rounds=0", "rounds is 0; it must be at least 1"),
    ],
)
def test_a_wrong_option_is_one_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        options, run = suite_of(composed("bench", "suite=dispatch", f"run_dir={tmp_path}", override))
        run(options)
