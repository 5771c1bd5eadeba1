"""How traffic changes: which kind of request comes when."""

import random
from collections.abc import Callable

SHARP, SMOOTH, ALONE = "sharp", "smooth", "alone"

OLD, NEW, OTHER = "old", "new", "other"


def _smooth(count: int, seed: int) -> list[str]:
    """p(new) = .1 + .7 i / N, p(old) = .8 - .7 i / N, as Liu et al. 2310.07177 have it; the rest is of a third kind."""
    draw, came = random.Random(f"smooth {seed}"), list[str]()
    for i in range(count):
        new, dice = 0.1 + 0.7 * i / count, draw.random()
        came.append(NEW if dice < new else OLD if dice < 0.9 else OTHER)
    return came


SHAPES: dict[str, Callable[[int, int], list[str]]] = {
    SHARP: lambda count, seed: [NEW] * count,
    SMOOTH: _smooth,
    ALONE: lambda count, seed: [NEW] * count,
}
"""From the length of a stream and a seed to the kinds of its requests. Before a sharp and a smooth one there is the old
kind, before one that is alone nothing."""
