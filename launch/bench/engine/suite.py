"""suite=engine: SmolLM2 on this machine's CPU beside transformers, vLLM and llama.cpp, and our kernels beside torch's.

Every engine computes the same cases with the same prompts and as many threads, in turns; while one has its turn, the
others are stopped. Beside our time stand two bounds: what our own steps would take if they were matrix products alone,
and if they only read the weights, at the speed at which this machine reads memory.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepladder.kernels.cpu.build import why_not
from stepladder.launch.bench.engine import attention, beside, neighbours, products
from stepladder.launch.bench.engine.figure import draw
from stepladder.launch.bench.engine.options import EngineBench
from stepladder.launch.bench.engine.serving import cpu_seconds_of_serving
from stepladder.launch.report import Goal, Report, Row, at_most
from stepladder.launch.where import BUNDLED
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.source.packaged import PACKAGED
from stepladder.workers.source.resolve import resolve

CONTENTS = "every time that was measured"


def run(config: EngineBench) -> Report:
    """Raises ValueError: a peer is not there, or kernels are to be measured where there are none."""
    torch.set_num_threads(config.threads)
    model, instead = found(config)
    shorter = None if config.scale == 1 else f"all lengths are multiplied by {config.scale:g}"
    note = "; ".join(filter(None, (instead, shorter))) or None
    spec = ModelSpec.load(model)
    if {"products", "attention"} & {*config.parts} and (why := why_not()):
        raise ValueError(
            f"there are no native kernels to measure here; leave products and attention out of parts: {why}"
        )
    rows: list[Row] = []
    summary: dict[str, Goal] = {}
    details: dict[str, Any] = {}
    picture = None
    if "cases" in config.parts:
        cases = beside.measure(config, model, spec.vocab_size)
        rows += beside.rows(cases)
        summary.update(beside.summary(cases))
        title = f"{config.model.name} on {config.threads} CPU threads{f' ({note})' if note else ''}"
        details["turns"], picture = beside.turns(cases), partial(draw, cases=cases, title=title)
    if "products" in config.parts:
        details["products"] = {}
        for dtype in config.dtypes:
            times, reads = products.measure(config.shapes, config.rows, dtype, config.repeats)
            mine = [*products.rows(times, dtype), *reads]
            rows += mine
            summary.update(products.summary(mine, dtype))
            details["products"] |= {f"{n} x {k} {dtype}": found for (n, k), found in times.items()}
    if "attention" in config.parts:
        more, goals = attention.measure(spec, config.scale, config.repeats)
        rows += more
        summary |= goals
    if "neighbours" in config.parts:
        more, goals = neighbours.measure(config, model, spec.vocab_size)
        rows += more
        summary |= goals
    if "serving" in config.parts:
        more, goals = _serving(model, config)
        rows += more
        summary |= goals
    return Report("engine", rows, summary, note, details, picture, titled=picture is None, contents=CONTENTS)


def found(config: EngineBench) -> tuple[Path, str | None]:
    """The model's directory; or the bundled model's, with a sentence, where a packaged model cannot be had."""
    wanted = config.model
    try:
        return Path(resolve(wanted.path, cache=wanted.cache, fetching=True)), None
    except ValueError as error:
        if wanted.path not in PACKAGED:
            raise
        return BUNDLED, f"the bundled model in place of {wanted.path}, which could not be had: {error}"


def _serving(model: Path, config: EngineBench) -> tuple[list[Row], dict[str, Goal]]:
    costs = cpu_seconds_of_serving(model, config.sequences, config.serving_tokens)
    case, rival = "serving float32", costs.engine * 1e3
    rows = [
        Row(case, "CPU per token, Ray + ZeroMQ + gateway", costs.serving * 1e3, "ms", rival=rival),
        Row(case, "CPU per token, the idle Ray below", costs.idle * 1e3, "ms", rival=rival),
    ]
    return rows, {
        "CPU of serving over the engine's": at_most(costs.serving / costs.engine, 0.1),
        "the same with the idle Ray": at_most((costs.serving + costs.idle) / costs.engine, 0.1),
    }


SUITE = EngineBench, run
