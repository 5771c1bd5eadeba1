"""suite=learning: what blocks and traces come to, its traffic, and a small run of everything."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.learning.figures import FIGURES, P99, Block, Done, Traced, compared
from stepladder.launch.bench.learning.options import LearningBench
from stepladder.launch.bench.learning.suite import report, run
from stepladder.launch.bench.learning.traffic import CHARACTERS, Load, _prompts
from stepladder.launch.report import Report, publish
from stepladder.launch.streaming import Timing
from stepladder.workers.speculation.learning.lease import GAPS, UNDER_LOAD
from stepladder.workers.speculation.learning.lease_trace import END, LEASE, LOAD, MICRO_BATCH, QUIET, Row
from tests.composed import composed


def options(run_dir: Path, *words: str) -> LearningBench:
    config: LearningBench = suite_of(composed("bench", "suite=learning", f"run_dir={run_dir}", *words))[0]
    return config


def block(number: int, tpots: list[float], begun: float = 0.0, busy: float = 4.0) -> Block:
    """Each of 11 tokens, the first after 50 ms; block 0 from 100 s to 108 s, the next one from 110 s. tpots: in ms."""
    timings = [Timing(ttft=0.05, latency=0.05 + ms / 100, output_tokens=11) for ms in tpots]
    begin = 100.0 + 10 * number
    done = Done(begun, begun / 2, begun / 10, begun / 5)
    return Block(number % 4 in (0, 3), Load(begin, begin + 8, busy, timings), done)


def blocks(allowed: list[float], other: list[float], count: int = 8, begun: float = 20.0) -> list[Block]:
    sides = {True: (allowed, begun), False: (other, 0.0)}
    return [block(number, *sides[number % 4 in (0, 3)]) for number in range(count)]


BATCH = Row(MICRO_BATCH, 100.0, 100.25, 1, GAPS)


def trace(*more: Row) -> list[Row]:
    """Load comes back in the middle of a micro-batch; the lease ends in the middle of another."""
    return [
        Row(LEASE, 99.0, 99.0, 1, GAPS),
        BATCH,
        Row(LOAD, 100.05, 100.05, 1),
        Row(QUIET, 103.0, 103.0, 1),
        Row(MICRO_BATCH, 103.0, 103.25, 1, GAPS),
        Row(END, 103.2, 103.2, 1),
        *more,
    ]


def told(found: list[Block], rows: list[Row] | None, whole: Done | None = None) -> Report:
    return report(found, whole or Done(ended=1, late=1), Traced.of([rows] if rows else []))


def value(result: Report, case: str, metric: str) -> float:
    (row,) = [row for row in result.rows if (row.case, row.metric) == (case, metric)]
    assert row.value is not None
    return row.value


def test_blocks_are_balanced_against_drift(tmp_path: Path) -> None:
    config = options(tmp_path)
    order = [config.allowed(number) for number in range(config.blocks)]
    assert order[:8] == [True, False, False, True, True, False, False, True]
    places = [sum(number for number, one in enumerate(order) if one is side) for side in (True, False)]
    assert places[0] == places[1] and all(a is not b for a, b in zip(order[::2], order[1::2], strict=True))


def test_both_sides_and_their_ratio() -> None:
    result = told(blocks([10.0, 12.0], [10.0, 10.0]), trace())
    assert value(result, "training allowed", "TPOT p50") == pytest.approx(11.0)
    assert value(result, "training not allowed", "TPOT p99") == pytest.approx(10.0)
    assert value(result, "training allowed", "TTFT p50") == pytest.approx(50.0)
    assert value(result, "training allowed", "requests") == 8
    assert value(result, "training allowed", "tokens per busy second") == pytest.approx(22 / 4)
    assert value(result, "training allowed / not", "TPOT p50") == pytest.approx(1.1)
    assert value(result, "training allowed / not", "tokens per busy second") == pytest.approx(1.0)
    assert value(result, "neighbours of one kind", "TPOT p50, A/A spread") == pytest.approx(0.0)
    goal = result.summary["TPOT p99, training allowed / not"]
    assert goal.value == pytest.approx(1.2) and goal.goal == "<= 1.05" and not goal.holds


def test_what_training_took() -> None:
    result = told(blocks([10.0] * 5, [10.0] * 5), trace())
    assert value(result, "training", "micro-batches") == 80 and value(result, "training", "optimizer steps") == 40
    assert value(result, "training", "core-seconds per 100 requests") == pytest.approx(100 * 8 / 20)
    share = value(result, "training", "share of all cores' time")
    assert share == pytest.approx(100 * 16 / (4 * 8 * (psutil.cpu_count() or 1)))


def test_chance_has_a_say_in_what_holds() -> None:
    """Neighbours of one kind that differ by a third excuse a ratio of a tenth; those that do not, do not."""
    calm = blocks([11.0] * 4, [10.0] * 4)
    assert not told(calm, trace()).summary["TPOT p99, training allowed / not"].holds
    dice = np.random.default_rng(1)
    rough = [block(n, [(11.0 if n % 4 in (0, 3) else 10.0) * dice.choice([0.75, 1.0, 1.35])] * 4) for n in range(24)]
    figure = FIGURES["TPOT p50"]
    ratio = compared(rough, figure)
    assert ratio.spread > 0.15 and ratio.low < ratio.value < ratio.high and ratio.low < 1.1 < ratio.high
    goal = told(rough, trace()).summary["TPOT p99, training allowed / not"]
    assert goal.goal == f"<= {round(1 + compared(rough, FIGURES[P99]).spread, 3):g}"


def test_the_spread_is_that_of_a_ratio_without_an_effect() -> None:
    """An effect of training alone makes none; it covers what differs by chance in about 95 % of cases."""
    figure = FIGURES["TPOT p50"]
    assert compared(blocks([20.0] * 3, [10.0] * 3), figure).spread == pytest.approx(0.0)
    covered = 0
    for seed in range(20):
        dice = np.random.default_rng(seed)
        found = compared([block(n, [float(dice.normal(10, 1))] * 3) for n in range(16)], figure)
        covered += max(found.value, 1 / found.value) <= 1 + found.spread
    assert covered >= 16


def test_what_the_trace_tells() -> None:
    result = told(blocks([10.0], [10.0]), trace())
    assert value(result, "load comes back", "times") == value(result, "load comes back", "times in a micro-batch") == 1
    assert value(result, "load comes back", "until training stood still then, median") == pytest.approx(200.0)
    assert value(result, "a lease ends", "until training stood still then, longest") == pytest.approx(50.0)
    assert value(result, "training", "longest micro-batch") == pytest.approx(250.0)
    assert value(result, "training", "the trace begins before the first block by") == pytest.approx(1.0)
    assert all(goal.holds for goal in result.summary.values())


def broken(result: Report) -> set[str]:
    return {name for name, goal in result.summary.items() if not goal.holds}


def test_training_that_does_not_make_way_is_told() -> None:
    waits, overruns = (
        "load that came back waited, micro-batches at most",
        "after the end of a lease, micro-batches at most",
    )
    found = blocks([10.0], [10.0])
    second = Row(MICRO_BATCH, 100.25, 100.5, 1, GAPS)
    assert broken(told(found, trace(second))) == {waits}
    assert not broken(told(found, trace(second._replace(kind=UNDER_LOAD)))), "it is meant to go on beside requests"
    assert broken(told(found, trace(Row(MICRO_BATCH, 103.25, 103.5, 1, GAPS)))) == {overruns}
    assert broken(told(found, trace(Row(MICRO_BATCH, 111.0, 111.2, 2, GAPS)))) == {overruns, "micro-batches where not"}
    assert broken(told(found, trace(), Done(ended=3, late=4))) == {"the same in all, of 3 leases"}


def test_without_a_trace_nothing_is_claimed() -> None:
    result = told(blocks([10.0], [10.0]), None)
    assert len(broken(result)) == 5 and all(result.summary[name].value is None for name in broken(result))
    assert len(broken(told(blocks([10.0], [10.0]), [BATCH]))) == 1, "no load came back, so nothing was seen"


def test_failed_requests_are_counted_and_not_timed() -> None:
    found = blocks([10.0, 10.0], [10.0, 10.0])
    found[0].load.timings[0].error, found[0].load.timings[0].latency = "HTTP 500", 99.0
    result = told(found, trace())
    assert broken(result) == {"failed requests"} and value(result, "training allowed", "requests") == 7
    assert value(result, "training allowed", "TPOT p99") == pytest.approx(10.0)


def test_the_traffic_is_the_same_for_the_same_seed() -> None:
    first, again, other = (list(islice(_prompts("tables", seed), 50)) for seed in (3, 3, 4))
    assert first == again != other and len({*first}) == 50 and max(map(len, first)) == CHARACTERS


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("blocks=6", "blocks is 6; it must be a multiple of 4"),
        ("tokens=1", "tokens is 1; it must be at least 2"),
        ("guard=10", "guard is 10; it must be at least 0 and below seconds, 10"),
        ("kind=verse", "kind is 'verse'; it must be one of source, prose, tables"),
        ("lulls=[2.0,1.0]", "lulls is"),
        ("warm=-1", "warm and temperature must be at least 0"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        options(tmp_path, word)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_small_run(tmp_path: Path) -> None:
    """A real deployment: it trains where it may and nowhere else, and makes way; its trace is left beside its
    versions. What it costs is not asked of so short a run."""
    small = ["engine.threads=1", "train.inner=32", "train.drafted=512", "monitor.wandb=disabled", "train.batch=32"]
    deploy = f"deploy='model=demo cluster=local speculate=hybrid train=online {' '.join(small)}'"
    words = [deploy, "blocks=4", "seconds=8", "guard=2", "warm=20", "tokens=48", "lulls=[0.3,2.0]"]
    result = run(options(tmp_path, *words))
    publish(result, words, tmp_path)
    timed = "TPOT p99, training allowed / not"
    assert not broken(result) - {timed}, result.summary
    assert value(result, "training", "share of all cores' time") > 0
    assert value(result, "training", "optimizer steps") > 0
    events = json.loads((tmp_path / "serve" / "drafter" / "lease-trace-0.json").read_text())["traceEvents"]
    assert {"X", "M", "i"} == {event["ph"] for event in events}
    assert {"learning.json", "learning.png", "learning-blocks.json"} <= {path.name for path in tmp_path.iterdir()}
