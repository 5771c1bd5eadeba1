"""suite=learning: a deployment whose drafter learns, under requests that come in bursts. Blocks of time in which
training is allowed and blocks in which it is not, by order, are compared; neighbours of one kind tell what chance does.

How long load that comes back waits for training, and whether training outlives its lease, is read from the trainer's
trace, which it writes when it leaves.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import psutil

from stepladder.launch.bench.learning.figure import draw
from stepladder.launch.bench.learning.figures import FIGURES, P99, Block, Compared, Done, Traced, Waits, compared
from stepladder.launch.bench.learning.options import LearningBench
from stepladder.launch.report import Goal, Report, Row, at_least, at_most

ALLOWED, NOT = "training allowed", "training not allowed"
MOST_LOSS = 0.05
GONE_SECONDS = 60.0


def run(config: LearningBench) -> Report:
    """Raises RuntimeError if the deployment does not come up, ValueError if nothing learns in it."""
    # Ray reads these once, when it is imported; they must be the private Ray's
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    from stepladder.launch.bench.failures.deployment_under_test import deployed, within
    from stepladder.launch.bench.learning.blocks import measured
    from stepladder.launch.bench.learning.trainer import Trainer

    run_dir = Path(config.run_dir) / "serve"
    with deployed("learning", str(run_dir), config.ray_cpus, config.options) as deployment:
        trainer = Trainer(deployment, run_dir)
        blocks, whole = measured(config, deployment.url, trainer)
        deployment.cluster.job("stop", deployment.name)
        within(GONE_SECONDS, lambda: not deployment.remains())
        traced = Traced.of(trainer.traces())
    return report(blocks, whole, traced)


def report(blocks: Sequence[Block], whole: Done, traced: Traced | None) -> Report:
    """What it all comes to.

    Args:
        whole: what was done from the first request to the last. traced: None if the trainer has left no trace.
    """
    ratios = {name: compared(blocks, figure) for name, figure in FIGURES.items()}
    rows = [*_served(blocks, ratios), *_trained(blocks)]
    first = blocks[0].load.begin
    if traced:
        rows += [*_waits("load comes back", traced.returns), *_waits("a lease ends", traced.ends)]
        longest = max((row.end - row.begin for row in traced.batches), default=0.0)
        rows.append(Row("training", "longest micro-batch", longest * 1e3, "ms"))
        rows.append(Row("training", "the trace begins before the first block by", first - traced.begin, "s"))
    rows.append(Row("a lease ends", "overrun by the controller's accounts", whole.late_seconds * 1e3, "ms in all"))
    summary = dict(_summary(blocks, ratios[P99], whole, traced))
    details = {"blocks": {"blocks": [block.to_json() for block in blocks], "whole": whole._asdict()}}
    return Report("learning", rows, summary, None, details, lambda figure: draw(figure, blocks, ratios, traced))


def _served(blocks: Sequence[Block], ratios: dict[str, Compared]) -> Iterator[Row]:
    for case, allowed in ((ALLOWED, True), (NOT, False)):
        side = [block for block in blocks if block.allowed is allowed]
        yield Row(case, "requests", _requests(side), "")
        for name, figure in FIGURES.items():
            yield Row(case, name, figure(side), figure.unit)
    for name, ratio in ratios.items():
        yield Row(f"{ALLOWED} / not", name, ratio.value, "x", 1.0, interval=(ratio.low, ratio.high))
        yield Row("neighbours of one kind", f"{name}, A/A spread", ratio.spread * 100, "%")


def _trained(blocks: Sequence[Block]) -> Iterator[Row]:
    """While it was allowed."""
    side = [block for block in blocks if block.allowed]
    done = Done(*map(sum, zip(*(block.done for block in side), strict=True)))
    seconds = sum(block.seconds for block in side)
    yield Row("training", "share of all cores' time", 100 * done.process_seconds / seconds / _cores(), "%")
    yield Row("training", "micro-batches", done.begun, "")
    yield Row("training", "optimizer steps", done.steps, "")
    if requests := _requests(side):
        yield Row("training", "core-seconds per 100 requests", 100 * done.core_seconds / requests, "s")


def _waits(case: str, waits: Waits) -> Iterator[Row]:
    yield Row(case, "times", waits.marks, "")
    yield Row(case, "times in a micro-batch", waits.met, "")
    yield Row(case, "most micro-batches then", waits.most, "", 1)
    if waits.seconds:
        yield Row(case, "until training stood still then, median", median(waits.seconds) * 1e3, "ms")
        yield Row(case, "until training stood still then, longest", waits.longest * 1e3, "ms")


def _summary(
    blocks: Sequence[Block], ratio: Compared, whole: Done, traced: Traced | None
) -> Iterator[tuple[str, Goal]]:
    yield f"TPOT p99, {ALLOWED} / not", at_most(ratio.value, round(1 + max(MOST_LOSS, ratio.spread), 3))
    yield "load came back, times", at_least(traced.returns.marks if traced else None, 1)
    yield "load that came back waited, micro-batches at most", at_most(traced.returns.most if traced else None, 1)
    yield "after the end of a lease, micro-batches at most", at_most(traced.ends.most if traced else None, 1)
    yield f"the same in all, of {whole.ended:g} leases", at_most(whole.late, whole.ended)
    sides = [[block for block in blocks if block.allowed is allowed] for allowed in (True, False)]
    yield "micro-batches where allowed", at_least(traced.within(sides[0]) if traced else None, 1)
    yield "micro-batches where not", at_most(traced.within(sides[1]) if traced else None, 0)
    yield "failed requests", at_most(sum(not t.success for block in blocks for t in block.load.timings), 0)


def _requests(blocks: Sequence[Block]) -> int:
    return sum(t.success for block in blocks for t in block.load.timings)


def _cores() -> int:
    return psutil.cpu_count() or 1


SUITE = LearningBench, run
