"""suite=afd: the formula by hand, and the emulated pipeline close to it."""

from pathlib import Path

import pytest

from launch.bench.afd.emulated import Case, measure
from launch.bench.afd.formula import Times, micro_batches, per_layer
from launch.bench.afd.suite import AfdBench, run


def test_the_formula_by_hand() -> None:
    times = Times(attention=10, ffn=10, transfer=5)
    assert [per_layer(times, 0, m) for m in (1, 2, 3, 4)] == [30, 30, 30, 40]
    assert per_layer(times, 1, 1) == 10
    assert per_layer(Times(attention=10, ffn=10, transfer=10), 1, 1) == pytest.approx(40 / 3)
    assert per_layer(Times(attention=10, ffn=10, transfer=5, reduce=4), 1, 1) == 14


@pytest.mark.parametrize(("transfer", "needed"), [(0, 2), (1, 3), (5, 3), (6, 4), (10, 4)])
def test_micro_batches_of_a_busy_ping_pong(transfer: float, needed: int) -> None:
    """m >= 2 (1 + tC / tF): three where a transfer takes at most half of a module (MegaScale-Infer, eq. 3)."""
    assert micro_batches(Times(attention=10, ffn=10, transfer=transfer)) == needed


def test_ladder_works_on_every_layer_with_both_pools_at_once() -> None:
    """Far apart even on a busy machine: a third of the time of ping-pong with one micro-batch."""
    times = Times(attention=0.02, ffn=0.02, transfer=0.01)
    slow, fast = (min(measure(Case(times=times, lag=lag, micro_batches=1), 6, 2).steps) for lag in (0, 1))
    assert slow > 6 * 0.06 and fast < 0.75 * slow


def test_a_small_run(tmp_path: Path) -> None:
    config = AfdBench(name="afd", run_dir=str(tmp_path), times=[[2, 2, 1, 0]], ratios=[[2, 1]], layers=[2, 4], steps=1)
    report = run(config)
    assert len({row.case for row in report.rows}) == 6 and report.emulated
    assert all(row.value is not None for row in report.rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": [4, 2]}, "layers is"),
        ({"times": [[0, 1, 1, 1]]}, "times must"),
        ({"ratios": [[0, 1]]}, "ratios must"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], sentence: str) -> None:
    values = {"name": "afd", "run_dir": "/r", "times": [[1, 1, 1, 0]], "ratios": [[1, 1]], "layers": [2, 4], "steps": 1}
    with pytest.raises(ValueError, match=sentence):
        AfdBench(**{**values, **options})  # type: ignore[arg-type]
