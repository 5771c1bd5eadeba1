"""suite=afd: the formulas by hand, the emulated pipeline close to them, and a small real run over two hosts."""

import json
from pathlib import Path

import pytest

from stepladder.launch.bench.afd import emulated_report
from stepladder.launch.bench.afd.emulated import Case as EmulatedCase
from stepladder.launch.bench.afd.emulated import Measured, measure
from stepladder.launch.bench.afd.emulated_report import EmulatedOptions, Layer
from stepladder.launch.bench.afd.formula import Times, micro_batches, per_layer, pipeline
from stepladder.launch.bench.afd.real import part as real
from stepladder.launch.bench.afd.real.model import Model, Shapes, Wire
from stepladder.launch.bench.afd.real.part import RealOptions
from stepladder.launch.bench.afd.real.point import Point, Turn, cases, modules_task, regime, tokens_task, transfer_task
from stepladder.launch.bench.afd.real.report import rows, summary
from stepladder.launch.bench.afd.real.task import (
    AFD,
    LADDER,
    LAG0,
    REPLICAS,
    TP,
    Case,
    Decoded,
    Load,
    Modules,
    Moment,
    Transfer,
    micro_sizes,
)
from stepladder.launch.bench.afd.real.trace import LANES, perfetto
from stepladder.launch.bench.afd.suite import AfdBench, run
from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.spans import MODULE, REST, Span, busy, covered, exposed
from stepladder.launch.report import publish

EMULATED = {"times": [[2, 2, 1, 0]], "ratios": [[2, 1]], "layers": [2, 4], "steps": 1}
TINY = Shapes(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=131)


def test_the_formula_by_hand() -> None:
    times = Times(attention=10, ffn=10, transfer=5)
    assert [per_layer(times, 0, m) for m in (1, 2, 3, 4)] == [30, 30, 30, 40]
    assert per_layer(times, 1, 1) == 10
    assert per_layer(Times(attention=10, ffn=10, transfer=10), 1, 1) == pytest.approx(40 / 3)
    assert per_layer(Times(attention=10, ffn=10, transfer=5, reduce=4), 1, 1) == 14


@pytest.mark.parametrize(("module", "transfer", "needed"), [(9, 0, 2), (9, 1, 3), (12, 6, 3), (7, 3.5, 3), (9, 5, 4)])
def test_micro_batches_of_a_busy_ping_pong(module: float, transfer: float, needed: int) -> None:
    """m >= 2 (1 + tC / tF): three where a transfer takes at most half of a module (MegaScale-Infer, eq. 3)."""
    assert micro_batches(Times(attention=module / 1e3, ffn=module / 1e3, transfer=transfer / 1e3)) == needed


@pytest.mark.parametrize("schedule", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "ms", [(10, 10, 5, 0, 0), (10, 10, 0, 0, 0), (5, 10, 2.5, 0, 0), (3, 3, 10, 0, 0), (2, 3, 9, 0, 9), (9, 6, 5, 0, 5)]
)
def test_a_pipeline_grows_by_the_formula(ms: tuple[float, ...], schedule: tuple[int, int]) -> None:
    """The published formulas are the slope of what an event simulation takes."""
    times = Times(**dict(zip(("attention", "ffn", "transfer", "reduce", "spacing"), ms, strict=True)))
    shallow, deep = (pipeline(times, *schedule, layers) for layers in (60, 120))
    assert (deep - shallow) / 60 == pytest.approx(per_layer(times, *schedule))


def test_a_pipeline_by_hand() -> None:
    """Two layers. Ladder: A at 0 and 10; F reads x_0 at 5 and A_0 at 15; F_1 is back at A at 30."""
    times = Times(attention=10, ffn=10, transfer=5)
    assert pipeline(times, 0, 1, 2) == 60
    assert pipeline(times, 1, 1, 2) == 30
    assert pipeline(Times(attention=10, ffn=10, transfer=5, reduce=4), 1, 1, 2) == 34


def test_ladder_works_on_every_layer_with_both_pools_at_once() -> None:
    """Far apart even on a busy machine: a third of the time of ping-pong with one micro-batch."""
    times = Times(attention=0.02, ffn=0.02, transfer=0.01)
    slow, fast = (min(measure(EmulatedCase(times=times, lag=lag, micro_batches=1), 6, 2).steps) for lag in (0, 1))
    assert slow > 6 * 0.06 and fast < 0.75 * slow


@pytest.mark.parametrize(("of_formula", "holds"), [([0.95, 1.09], True), ([0.8, 1.19], False), ([1.0, 1.11], False)])
def test_a_layer_is_near_its_formula_on_both_sides(of_formula: list[float], holds: bool) -> None:
    case = EmulatedCase(times=Times(attention=1, ffn=2, transfer=0), lag=1, micro_batches=1)
    (goal,) = emulated_report.summary([Layer(case, 2 * r, 0, Measured([1.0], 0, 0, 0)) for r in of_formula]).values()
    assert goal == (max(of_formula, key=lambda r: abs(r - 1)), "0.9 to 1.1", holds)


def test_every_number_of_micro_batches_that_is_asked_for() -> None:
    options = EmulatedOptions(**{**EMULATED, "times": [[2, 2, 1, 0], [2, 2, 1, 1]]}, micro_batches=[2, 5])  # type: ignore[arg-type]
    measured = [(case.attention, case.times.reduce > 0, case.lag, case.micro_batches) for case in options.cases]
    ping_pong = [(1, False, 0, 2), (1, False, 0, 5), (1, False, 1, 1)]
    assert measured == [*ping_pong, *((2, *rest) for _, *rest in ping_pong), (1, True, 1, 1)]


def test_what_is_exposed_is_what_no_rank_computes_in() -> None:
    """Lag 0 with one micro-batch: both transfers of every layer, and x_0. A ladder: only where the pipeline fills."""
    times = Times(attention=0.02, ffn=0.02, transfer=0.01)
    slow, fast = (measure(EmulatedCase(times=times, lag=lag, micro_batches=1), 6, 1) for lag in (0, 1))
    assert 6 * 0.02 < slow.exposed < slow.steps[0] - 6 * 0.04 and fast.exposed < 0.06


def test_a_small_emulated_part(tmp_path: Path) -> None:
    report = run(bench(tmp_path, parts=["emulated"]))
    publish(report, ["suite=afd"], tmp_path)
    assert len({row.case for row in report.rows}) == 6
    assert all(row.value is not None and row.case.startswith("emulated") for row in report.rows)
    assert report.emulated and all(name.startswith("emulated") for name in report.summary)


def test_what_is_covered() -> None:
    """Windows 0..10 and 20..30; spans that overlap each other and the windows' ends."""
    spans = [Span(MODULE, "a", -2, 3), Span(MODULE, "b", 1, 4), Span(REST, "c", 6, 8), Span(MODULE, "d", 25, 99)]
    windows = [(0.0, 10.0), (20.0, 30.0)]
    assert covered(spans, windows) == 6 + 5
    assert busy(spans, windows) == (4 + 5) / 20
    assert exposed(spans, windows) == (4 + 5) / 2


def test_a_turn_is_as_long_as_its_slower_rank() -> None:
    a = Decoded([(0.0, 4.0)], [Span(MODULE, "a", 0, 2)], [[1, 2]])
    b = Decoded([(0.0, 5.0)], [Span(MODULE, "b", 1, 3)], [[3]])
    assert Turn.of(Case(TP, 0), [a, b]) == Turn(5.0, 1.0, (0.5, 0.4), [[1, 2]])
    assert Turn.of(Case(REPLICAS, 0), [a, b]).tokens == [[1, 2, 3]]
    uneven = [Decoded([(0.0, end) for end in steps], [], [[1]]) for steps in ((4.0, 9.0, 4.0), (4.0, 4.0, 9.0))]
    assert [Turn.of(Case(kind, 0), uneven).step for kind in (TP, REPLICAS)] == [9.0, 4.0]  # replicas never wait
    f = Decoded([], b.compute, [])
    assert Turn.of(LADDER, [a, f]) == Turn(4.0, 1.0, (0.5, 0.5), [[1, 2]])


def point(
    module: float = 2.0, half: float = 1.8, transfer: float = 1.0, wire: Wire | None = None, spacing: float = 0.0,
    batch: int = 4, **steps: float,
) -> Point:  # fmt: skip
    """4 layers; a module takes `module` with all rows, `half` with fewer; the tokens' reduce a tenth of `transfer`."""
    load = Load(batch=batch, context=8, steps=1, late=0.0)
    turns = {case: [Turn(10.0, 1.0, (0.5, 0.5), [[1, 2, 3, 4]])] * 3 for case in cases(4)}
    named = {case.name: case for case in turns}
    for name, step in steps.items():
        case = named[{"ladder": LADDER.name, "lag0": LAG0.name, "m2": "AFD lag 0, m = 2"}[name]]
        turns[case] = [Turn(step, 1.0, (0.5, 0.5), [[1, 2, 3, 4]])] * 3
    tasks = {modules_task(case, load): module if case.micro_batches == 1 else half for case in turns}
    modules = {task: Modules(seconds, seconds, 0.0) for task, seconds in tasks.items()}
    transfers = {transfer_task(case, load): Transfer(transfer, spacing) for case in turns if case.kind != REPLICAS}
    transfers[tokens_task(load)] = Transfer(transfer / 10, 0.0)
    return Point("m", 4, wire or Wire(rate=100), load, turns, modules, transfers)


def test_bounds_of_a_point() -> None:
    """Modules of 2, transfers of 1: a layer takes 6 at lag 0 and 2 in a ladder, whose pipeline fills for 1.

    TP: the embedding's reduce, the tokens' of 0.1, and the published 3 a module, or 2 and the last reduce.
    """
    found = point()
    assert found.bound(LAG0).step == 4 * 6 and found.bound(LAG0).layer == 6
    assert found.bound(LADDER) == (pipeline(Times(attention=2, ffn=2, transfer=1), 1, 1, 4), 2)
    assert found.bound(Case(TP, 0)).step == 1 + 8 * 3 + 0.1
    assert found.bound(Case(TP, 1)).step == 1 + 8 * 2 + 1 + 0.1
    assert found.bound(Case(REPLICAS, 0)).step == 8 * 2
    assert found.weight == found.far == 1
    burst, queue = point(spacing=3.0), point(spacing=1.0)  # a message after a silence is never later than a lone one
    assert burst.in_a_burst and [burst.bound(case) for case in cases(4)] == [queue.bound(case) for case in cases(4)]


def test_regimes() -> None:
    """Noise around the threshold does not make two of links; a message longer than a module is its own point's."""
    points = [point(half=half) for half in (1.38, 1.5, 1.42)] + [point(half=1.5, transfer=3), point(half=1.0, batch=8)]
    assert [regime(each, points) for each in points] == [*["memory-bound"] * 3, "latency-bound", "compute-bound"]


def test_goals_are_of_the_point_where_a_transfer_is_half_a_module() -> None:
    points = [
        point(wire=Wire(rate=60), spacing=1.2, ladder=10.0, lag0=11.0),  # a part of each message passes in a burst
        point(wire=Wire(rate=100), spacing=1.05, ladder=10.0, lag0=25.0, m2=14.0),
        point(wire=Wire(rate=50), transfer=1.9, ladder=10.0, lag0=11.0),
        point(wire=Wire(rate=70), half=1.0, batch=8, ladder=10.0, lag0=11.0),  # compute-bound
        point(wire=Wire(late_ms=0.1), transfer=0.2, ladder=10.0, lag0=11.0),  # nothing to hide
    ]
    lines = summary(points)
    (lag0,) = [goal for name, goal in lines.items() if name.startswith("shaped link: TPOT of lag 0")]
    (best,) = [goal for name, goal in lines.items() if name.startswith("shaped link: TPOT of best ping-pong, m = 3")]
    assert lag0 == (2.5, ">= 1.8", True) and best == (1.0, ">= 1.3", False)
    without = {name: goal for name, goal in lines.items() if name.startswith("emulated latency")}
    assert list(without.values()) == [(None, ">= 1.8", False), (None, ">= 1.3", False)]
    assert all(name.endswith("m: no point of 1 was eligible") for name in without)
    assert not any(name.startswith("emulated latency") for name in summary(points[:-1]))  # not measured at all
    assert {row.unit for row in rows(points)} == {"ms", "tokens/s", "%", "ms/step"}
    (alike,) = [goal for name, goal in lines.items() if "continue alike" in name]
    assert alike.value == 100


def test_cases_that_draw_other_tokens_are_told() -> None:
    found = point()
    assert found.alike == 1
    found.turns[LADDER][0] = Turn(1.0, 1.0, (0.5, 0.5), [[1, 2, 0, 4]])
    assert found.alike == 7 / 8


def test_micro_batches_of_a_batch() -> None:
    assert [micro_sizes(12, m) for m in (1, 3)] == [[12], [4, 4, 4]]
    assert micro_sizes(5, 4) == [2, 1, 1, 1]
    assert [case.micro_batches for case in cases(2) if case.kind == AFD] == [1, 1, 2]


def test_a_trace_has_a_lane_for_each_side_and_direction() -> None:
    """The last step only; a message from the moment it was sent to the one it could be read."""
    blocks = {"attention 0": 0.0, "attention 1": 2.0}
    sent = [Moment(step, name, 0, 10.0 * step + at) for step in (0, 1) for name, at in blocks.items()]
    came = [Moment(m.step, m.block, m.micro, m.at + 0.5) for m in reversed(sent)]
    compute = [Span(MODULE, "attention 0", 1.0, 2.0), Span(MODULE, "attention 0", 11.0, 12.0)]
    a, f = Decoded([(0.0, 9.0), (10.0, 19.0)], compute, [], sent, []), Decoded([], compute[1:], [], [], came)
    events = perfetto({"ladder AFD": [a, f]})["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == list(LANES)
    assert [(e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(0, 1e6, 1e6), (2, 1e6, 1e6)]
    begins, ends = ([e["ts"] for e in events if e["ph"] == ph] for ph in "be")
    assert begins == [0, 2e6] and ends == [0.5e6, 2.5e6]
    assert [e["args"]["message"] for e in events if e["ph"] == "b"] == [
        "attention 0, micro-batch 0",
        "attention 1, micro-batch 0",
    ]


def bench(tmp_path: Path, **options: object) -> AfdBench:
    model = Model(name="tiny", shapes=TINY, batches=[5], wires=[Wire(), Wire(late_ms=5)])
    asked = RealOptions(models=[model], context=20, steps=2, rounds=2)
    values = {"name": "afd", "run_dir": str(tmp_path), "parts": ["real"], "emulated": EmulatedOptions(**EMULATED)}  # type: ignore[arg-type]
    return AfdBench(**{**values, "real": asked, **options})  # type: ignore[arg-type]


@pytest.mark.timeout(180)
def test_a_small_real_run_over_two_hosts(tmp_path: Path) -> None:
    """What does not depend on the machine's speed: the same tokens everywhere, and no step shorter than its delays."""
    if why := netns.unavailable():
        pytest.skip(why)
    report = run(bench(tmp_path, trace=str(tmp_path / "trace.json")))
    publish(report, ["suite=afd"], tmp_path)
    assert len((tmp_path / "afd-rounds.jsonl").read_text().splitlines()) == 2 * 2
    unshaped, late = json.loads((tmp_path / "afd-points.json").read_text())["points"]
    assert set(unshaped["cases"]) == {case.name for case in cases(5)}
    (alike,) = [goal for name, goal in report.summary.items() if "continue alike" in name]
    assert alike.value == 100
    found = late["cases"]
    assert found["ladder AFD"]["tC_ms"] >= 5
    assert found["AFD lag 0, m = 1"]["TPOT_ms"] >= 2 * 2 * 5  # a way there and one back in each of two layers
    assert found["AFD lag 0, m = 1"]["exposed_ms"] >= 0.9 * 20
    assert found["TP 2 standard"]["TPOT_ms"] >= 6 * 5  # embedding, two layers' four, tokens
    assert found["2 replicas"]["TPOT_ms"] < found["ladder AFD"]["TPOT_ms"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {(e["pid"], e["tid"]) for e in events if "ts" in e} == {(pid, tid) for pid in (0, 1) for tid in range(4)}
    assert (tmp_path / "afd.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": [4, 2]}, "layers is"),
        ({"times": [[0, 1, 1, 1]]}, "times must"),
        ({"ratios": [[0, 1]]}, "ratios must"),
        ({"micro_batches": []}, "micro_batches is"),
        ({"micro_batches": [2, 0]}, "micro_batches is"),
        ({"micro_batches": [2], "times": [[2, 2, 1, 1]]}, "add some"),
    ],
)
def test_emulated_options_that_cannot_be(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EmulatedOptions(**{**EMULATED, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"rounds": 0}, "real.rounds is 0"), ({"models": []}, "real.models is empty")],
)
def test_real_options_that_cannot_be(options: dict[str, object], sentence: str) -> None:
    model = Model(name="tiny", shapes=TINY, batches=[4], wires=[Wire()])
    with pytest.raises(ValueError, match=sentence):
        RealOptions(**{"models": [model], "context": 8, "steps": 1, "rounds": 1, **options})  # type: ignore[arg-type]


def test_a_last_model_that_cannot_be_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(netns, "unavailable", lambda: None)
    monkeypatch.setattr(real, "Hosts", lambda _: pytest.fail("hosts were built"))
    first = Model(name="tiny", shapes=TINY, batches=[4], wires=[Wire()])
    for path, sentence in (("nowhere", "not a directory"), ("launch/demo_model", "model last takes")):
        models = [first, Model(name="last", path=path, batches=[4], wires=[Wire()])]
        with pytest.raises(ValueError, match=sentence):
            real.measure(RealOptions(models=models, context=60_000, steps=1, rounds=1), tmp_path / "j", trace=False)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts is"):
        bench(tmp_path, parts=["unreal"])
    with pytest.raises(ValueError, match="trace is of the real part"):
        bench(tmp_path, parts=["emulated"], trace="t.json")
    with pytest.raises(ValueError, match="either a path or shapes"):
        Model(name="m", batches=[4], wires=[Wire()])
    for sentence, rate, late_ms in (("one of them", 5, 5), ("rate of a link is -5", -5, 0)):
        with pytest.raises(ValueError, match=sentence):
            Wire(rate=rate, late_ms=late_ms)
