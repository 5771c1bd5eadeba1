"""suite=shift: who sees what when, what the curves come to, and a small run of everything."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.shift.curves import Curve, Found, Look
from stepladder.launch.bench.shift.options import ShiftBench
from stepladder.launch.bench.shift.shapes import ALONE, NEW, OLD, OTHER, SHAPES, SHARP, SMOOTH
from stepladder.launch.bench.shift.streams import ALL, STATIC, Streamed
from stepladder.launch.bench.shift.suite import report, run
from stepladder.launch.recipes import library_traffic
from stepladder.workers.text.tokenizer import Tokenizer
from tests.composed import composed

DEMO = Path(__file__).parents[2] / "launch" / "demo_model"
SMALL = [
    "threads=1", "before=32", "stream=32", "looks=[16]", "judged=8", "oracle=50", "requests=2", "tokens=40",
    "errors=true", "distilled=true", "fixed=[2]", "train.inner=32", "train.drafted=512", "train.batch=32",
]  # fmt: skip


def options(run_dir: Path, *words: str) -> ShiftBench:
    config: ShiftBench = suite_of(composed("bench", "suite=shift", f"run_dir={run_dir}", *words))[0]
    return config


def test_shapes() -> None:
    assert set(SHAPES[SHARP](9, 0)) == set(SHAPES[ALONE](9, 0)) == {NEW}
    came = SHAPES[SMOOTH](10_000, 0)
    first, last = Counter(came[:1000]), Counter(came[-1000:])
    assert 100 < first[NEW] < 180 and 720 < first[OLD] < 810, "shares of .1 to .17, and of .8 to .73"
    assert 720 < last[NEW] < 810 and 100 < last[OLD] < 180
    assert 900 < Counter(came)[OTHER] < 1100 and came == SHAPES[SMOOTH](10_000, 0) != SHAPES[SMOOTH](10_000, 1)


def test_beginnings_are_the_same_for_the_same_seed_and_no_two_are() -> None:
    tokenizer = Tokenizer(DEMO)
    many = library_traffic.beginnings(tokenizer, "tables", 40, 3)
    assert library_traffic.beginnings(tokenizer, "tables", 10, 3) == many[:10], "fewer are the first ones"
    assert len({*many}) == 40 and {len(one) for one in many} == {library_traffic.PROMPT}
    with pytest.raises(ValueError, match=r"there are only \d+ different beginnings of prose here; 1000000 are wanted"):
        library_traffic.beginnings(tokenizer, "prose", 1_000_000, 0)


def found(share: float) -> Found:
    return Found(share, share / 2)


def test_the_mean_of_a_part_of_a_stream() -> None:
    curve = Curve("one", [None, found(0.4), found(0.6), found(0.8)])
    assert curve.mean(0, 16, 1.0) == pytest.approx(0.2), "it had nothing to say to the first eight"
    assert curve.mean(16, 32, 1.0) == pytest.approx(0.7) and curve.mean(16, 32, 0.0) == pytest.approx(0.35)


def streamed(kind: str, shape: str, learnt: dict[int, float], old: float = 0.4) -> Streamed:
    """Static has .1, the oracle .9."""
    looks = [Look(come, found(share), found(old), come, come / 10) for come, share in learnt.items()]
    live = [found(share) for share in learnt.values() for _ in range(8)]
    curves = {STATIC: Curve(STATIC, [found(0.1)] * len(live)), ALL: Curve(ALL, live, looks)}
    oracle = (found(0.9), found(0.3)) if shape == SHARP else None
    return Streamed(kind, 1.0, shape, curves, (found(0.1), found(0.4)), oracle, 50)


def test_what_must_hold_after_a_far_shift(tmp_path: Path) -> None:
    config = options(tmp_path)
    stream = streamed("tables", SHARP, {64: 0.5, 144: 0.66, 496: 0.8, 1000: 0.88}, old=0.35)
    goals = report(config, [stream], []).summary
    name = "tables, temperature 1, sharp"
    assert goals[f"{name}: of the gap, 144 requests"].value == pytest.approx(0.7)
    share = goals[f"{name}: of the gap, 496 requests"]
    assert share.value == pytest.approx(0.875) and not share.holds
    lacks = goals[f"{name}: below the oracle, 1000 requests"]
    assert lacks.value == pytest.approx(0.02) and lacks.holds
    kept = goals[f"{name}: of the old kind's acceptance"]
    assert kept.value == pytest.approx(0.875) and not kept.holds
    smollm2 = replace(config, model=replace(config.model, name="smollm2"))
    goals = report(smollm2, [streamed("tables", SHARP, {200: 0.5})], []).summary
    assert goals[f"{name}: acceptance gained in 200 requests"].value == pytest.approx(0.4)
    assert goals[f"{name}: of the gap to the oracle"] == (pytest.approx(0.5), ">= 0.45", True)


def test_what_must_hold_in_a_smooth_stream(tmp_path: Path) -> None:
    config = options(tmp_path, "stream=128")
    goals = report(config, [streamed("tables", SMOOTH, {64: 0.2, 128: 0.05})], []).summary
    ((name, goal),) = goals.items()
    assert name == "tables, temperature 1, smooth: second half, over static"
    assert goal.value == pytest.approx(0.5) and not goal.holds, "in the first half it was better, which is not asked"


@pytest.mark.timeout(180)
def test_a_small_run(tmp_path: Path) -> None:
    """Everybody sees the same requests; who learns gets better at them; served texts are plain decoding's."""
    torch.set_num_threads(1)
    result = run(options(tmp_path, *SMALL, "shapes=[sharp,smooth,alone]"))
    streams = {one["shape"]: one for one in result.details["streams"]["streams"]}
    everybody = ["static", "online", "online, errors", "a tenth, then static"]
    assert [*streams] == ["sharp", "smooth", "alone"] and all([*one["curves"]] == everybody for one in streams.values())
    assert all(len(curve["live"]) == 4 for one in streams.values() for curve in one["curves"].values())
    online = streams["sharp"]["curves"]["online"]["looks"]
    assert [look["come"] for look in online] == [16, 32] and online[1]["steps"] > online[0]["steps"] > 0
    static = streams["sharp"]["static"][0]["overlap"]
    assert online[1]["new"]["overlap"] > static and streams["sharp"]["oracle"][0]["overlap"] > static
    assert streams["alone"]["curves"]["online"]["live"][0] is None, "nobody has taught it anything by then"
    assert streams["sharp"]["curves"]["static"]["live"][0] == streams["sharp"]["curves"]["online"]["live"][0]
    (case,) = result.details["cases"]["cases"]
    sides = ["none", "suffix", "hybrid frozen", "hybrid online", "hybrid online k=2"]
    assert [*case["figures"]] == sides and not any(case["texts_that_differ"].values())
    assert [*case["over_frozen"]] == ["hybrid"]
    heads = [path.name for path in sorted((tmp_path / "heads" / "tables-1").iterdir())]
    assert heads == ["frozen", "online"]
    assert result.draw is not None
    _draw(result.draw)


def _draw(draw: Any) -> None:
    from matplotlib.figure import Figure

    draw(Figure(layout="constrained"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kinds=[poems]"], "kinds is ['poems']; it must name one or more of"),
        (["shapes=[round]"], "shapes is ['round']; it must name one or more of sharp, smooth, alone, each once"),
        (["drafters=[ngram]"], "drafters is ['ngram']; it must name one or more of suffix, head, hybrid, each once"),
        (["source=tables"], "source is tables; it must be one of source, prose, tables, and none of kinds"),
        (["traffic=mail"], "traffic is 'mail'; it must be library or chat"),
        (["kinds=[code]"], "kinds is ['code']; it must name one or more of source, prose, tables, each once"),
        (["looks=[12]"], "looks has 12; each must be a multiple of 8"),
        (["shapes=[smooth]"], "requests are served after a sharp stream; name it in shapes, or set requests=0"),
        (["batches=[0]"], "every batch must be at least 1"),
        (["temperatures=[]"], "temperatures is []; it must hold one value or more"),
        (["fixed=[0]"], "speculate.k is 0; it must be from 1 to"),
        (["stream=0"], "stream is 0"),
        (["train.steps=0"], "train.steps is 0; it must be 1 or more"),
        (["train.ranks=2"], "train.ranks is 2, but here one process learns, all that it is given; omit it"),
        (["train=off"], "train.kind is off, but here one process learns"),
        (["requests=-1"], "requests is -1; it must be at least 0"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        options(tmp_path, *words)
    assert sentence in str(error.value) and "\n" not in str(error.value)
