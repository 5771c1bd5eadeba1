"""suite=overlap: its bound against hand-made timelines, its statistics, and a small run over real hosts and links."""

import json
from pathlib import Path

import pytest

from stepladder.launch.bench.overlap.bound import Parts, shortest_step
from stepladder.launch.bench.overlap.suite import OverlapBench, Wire, run
from stepladder.launch.bench.overlap.task import BOUND, VARIANTS, WIRINGS, Shapes
from stepladder.launch.bench.overlap.trace import hidden_share, perfetto, under_the_next_block
from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.paired import paired_ratio
from stepladder.launch.bench.rig.spans import MODULE, REDUCE, WAIT, Span
from stepladder.launch.report import publish

C, A, LAYERS = 4.0, 3.0, 50


def per_module(wiring: str, reduce: float, spacing: float) -> float:
    """Time of a module in the middle of a long model."""
    times = [
        shortest_step(Parts(C, C, reduce, spacing, rest=0.0, layers=layers), wiring) for layers in (LAYERS, 2 * LAYERS)
    ]
    return (times[1] - times[0]) / (2 * LAYERS)


@pytest.mark.parametrize("reduce", [1.0, 3.0, 4.0, 6.0, 20.0])
def test_the_bound_is_the_published_model_for_equal_modules(reduce: float) -> None:
    """Standard c + a; parallel c + a/2; ladder max(c, a) on a narrow link, max(c, (c + a)/2) on a slow one."""
    assert per_module("standard", reduce, reduce) == pytest.approx(C + reduce)
    assert per_module("parallel", reduce, reduce) == pytest.approx(C + reduce / 2)
    assert per_module("ladder", reduce, spacing=reduce) == pytest.approx(max(C, reduce))
    assert per_module("ladder", reduce, spacing=0.0) == pytest.approx(max(C, (C + reduce) / 2))
    assert per_module("ladder-parallel", reduce, spacing=reduce) == pytest.approx(max(C, reduce / 2))
    assert per_module(BOUND, reduce, reduce) == pytest.approx(C)


def test_the_bound_of_one_layer_by_hand() -> None:
    """Embedding's reduce 3, attention 2, ffn 5. Ladder: attention's reduce runs 5..8 under the ffn 5..10."""
    parts = Parts(attention=2.0, ffn=5.0, reduce=3.0, spacing=3.0, rest=1.0, layers=1)
    assert shortest_step(parts, "standard") == 1 + 3 + (2 + 3) + (5 + 3)
    assert shortest_step(parts, "ladder") == 1 + 3 + (2 + 5) + 3
    assert shortest_step(parts, "parallel") == shortest_step(parts, "ladder-parallel") == 1 + 3 + (2 + 5) + 3
    assert shortest_step(parts, BOUND) == 1 + 7


def test_what_a_reduce_takes_of_the_core_does_not_hide() -> None:
    """The same with 0.5 of the core for each reduce: attention's is under way beside the ffn."""
    parts = Parts(attention=2.0, ffn=5.0, reduce=3.0, spacing=3.0, rest=1.0, layers=1, cpu=0.5)
    assert shortest_step(parts, "ladder") == 1 + 3 + (2 + 5 + 0.5) + 3
    assert shortest_step(parts, "standard") == 1 + 3 + (2 + 3) + (5 + 3), "nothing is beside a reduce"


def test_a_token_bucket_does_not_raise_the_bound() -> None:
    """Two reduces at once take more than twice as long as one that finds the bucket full; in between it fills up."""
    times = [per_module("ladder", reduce=6.0, spacing=spacing) for spacing in (6.0, 7.8)]
    assert times[0] == times[1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rate": -4.0}, "rate of a link is -4"),
        ({"late_ms": -5.0}, "late_ms of a wire is -5"),
        ({"rate": 140.0, "late_ms": 5.0}, "make it two wires"),
    ],
)
def test_a_wire_is_shaped_or_late(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Wire(**values)


def test_a_paired_ratio_ignores_what_both_sides_share() -> None:
    noise = [1.0, 5.0, 2.0, 9.0, 1.5, 3.0, 7.0]
    ratio = paired_ratio([1.6 * n for n in noise], noise)
    assert ratio == pytest.approx((1.6, 1.6, 1.6))
    spread = paired_ratio([1.0, 1.2, 1.4, 1.1, 1.3], [1.0] * 5)
    assert spread.median == 1.2 and 1.0 <= spread.low < 1.2 < spread.high <= 1.4


def test_a_trace_tells_what_ran_under_what() -> None:
    """Blocks at 0..4, 4..8, 10..12; the reduce of the first is half under the second, that of the second is not."""
    blocks = [Span(MODULE, f"block {k}", *at) for k, at in enumerate([(0, 4), (4, 8), (10, 12)])]
    reduces = [Span(REDUCE, f"reduce {k}", *at) for k, at in enumerate([(-2, 0), (4, 6), (8, 10), (12, 13)])]
    waits = [Span(WAIT, f"reduce {k}", *at) for k, at in [(0, (-2, 0)), (2, (8, 10)), (3, (12, 13))]]
    assert hidden_share([*blocks, *reduces, *waits]) == pytest.approx(2 / 7)
    assert under_the_next_block([*blocks, *reduces]) == 0.5
    events = perfetto({"ladder": [[*blocks, *reduces, *waits]]})["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] == "b"] == [0, 6e6, 10e6, 14e6]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0}


def bench(tmp_path: Path, **options: object) -> OverlapBench:
    shapes = Shapes(hidden=64, intermediate=128, layers=2, heads=4, vocab=128, dtype="float32")
    defaults = {"wires": [Wire(rate=50.0), Wire(late_ms=3.0)], "batches": [2], "context": 8, "prefill": 8, "rounds": 2}
    values = {"name": "overlap", "run_dir": str(tmp_path), "device": "cpu", "shapes": shapes, **defaults, **options}
    return OverlapBench(**values)  # type: ignore[arg-type]


@pytest.mark.timeout(120)
def test_a_small_run_over_two_hosts(tmp_path: Path) -> None:
    if why := netns.unavailable():
        pytest.skip(why)
    report = run(bench(tmp_path, trace=str(tmp_path / "trace.json")))
    publish(report, ["suite=overlap"], tmp_path)
    cases = {row.case for row in report.rows}
    assert len(cases) == 4 and any("50 Mbit/s" in case for case in cases)
    written = json.loads((tmp_path / "overlap-points.json").read_text())["points"]
    for point in written:
        assert set(point["variants"]) == set(VARIANTS)
        assert all(point["variants"][wiring]["hidden"] for wiring in WIRINGS)
    late = [p for p in written if p["late_ms"]]
    for point in late:  # 5 reduces of 3 ms each that nothing hides
        assert point["parts_ms"]["reduce"] >= 3 and point["variants"]["standard"]["ms"] >= 15
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "overlap.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda"}, "takes 2"),
        ({"batches": []}, "must not be empty"),
        ({"prefill": 1}, "prefill is 1, which is a decode step"),
        ({"trace": "/"}, "trace is /, a directory; name a file"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        bench(tmp_path, **options)
