"""The picture of suite=learning: times per token on both sides, what they come to, and how long load waited."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepladder.launch.bench.learning.figures import Block, Compared, Traced

COLOURS = {True: "#cc3311", False: "#4477aa"}


def draw(figure: Any, blocks: Sequence[Block], ratios: Mapping[str, Compared], traced: Traced | None) -> None:
    figure.set_size_inches(12, 3.6)
    times, compared, waits = figure.subplots(1, 3)
    _times(times, blocks)
    _compared(compared, ratios)
    _waits(waits, traced)


def _times(axes: Any, blocks: Sequence[Block]) -> None:
    """A cumulative distribution per side."""
    for allowed, colour in COLOURS.items():
        sides = [block for block in blocks if block.allowed is allowed]
        values = np.sort([t.tpot * 1e3 for block in sides for t in block.load.timings if t.success])
        label = f"training {'' if allowed else 'not '}allowed"
        axes.plot(values, np.arange(1, len(values) + 1) / max(1, len(values)), color=colour, label=label)
    axes.set_xlabel("time per token of a request, ms")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _compared(axes: Any, ratios: Mapping[str, Compared]) -> None:
    """A mark with its interval per figure; grey is where the same differs from itself."""
    for place, ratio in enumerate(ratios.values()):
        axes.fill_between([place - 0.3, place + 0.3], 1 - ratio.spread, 1 + ratio.spread, color="#cccccc", lw=0)
        axes.plot([place, place], [ratio.low, ratio.high], color=COLOURS[True])
        axes.plot(place, ratio.value, "o", color=COLOURS[True])
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xticks(range(len(ratios)), [*ratios], rotation=15, ha="right", fontsize="small")
    axes.set_ylabel("training allowed / not")


def _waits(axes: Any, traced: Traced | None) -> None:
    """How long micro-batches took, and how long load that came back waited for one to end."""
    if traced and traced.batches:
        axes.hist(
            [(row.end - row.begin) * 1e3 for row in traced.batches], bins=40, color="#bbbbbb", label="micro-batches"
        )
        axes.hist(np.array(traced.returns.seconds) * 1e3, bins=40, color=COLOURS[True], label="waits of returning load")
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    axes.set_xlabel("ms")
    axes.set_ylabel("how many")
