"""How long a step would take at best, from the times of its parts."""

from dataclasses import dataclass

from stepladder.launch.bench.overlap.task import BOUND


@dataclass(frozen=True)
class Parts:
    """Measured seconds. attention, ffn: compute of one block of each; reduce: a lone all-reduce, from issue to done;
    spacing: from one reduce's end to the next one's, if both were issued together (0 on a link that is only slow to
    answer, `reduce` on one that is only narrow); rest: of a step, what is neither block nor reduce; cpu: of a
    core, for one reduce."""

    attention: float
    ffn: float
    reduce: float
    spacing: float
    rest: float
    layers: int
    cpu: float = 0.0


def shortest_step(parts: Parts, wiring: str) -> float:
    """Seconds of a step in which nothing waits but for what it needs.

    Block k begins when block k-1 has been computed and the reduce of block k-1-lag is done; a reduce is done `reduce`
    after its issue and `spacing` after the one before it. For equal blocks this is the model of Ladder Residual's
    authors' measurements: standard c + a a module, ladder max(c, a) where reduces queue and max(c, (c + a)/2) where
    they do not, parallel c + a/2. The embedding's reduce and the last one have nothing to hide under.

    A CPU rank has one core: what a reduce takes of it (`cpu`, part of `reduce`) cannot pass under a block's compute, so
    a block under which a reduce is on its way takes that much longer. On a GPU it is 0.
    """
    layer = [parts.attention, parts.ffn]
    blocks = ([sum(layer)] if wiring.endswith("parallel") else layer) * parts.layers
    if wiring == BOUND:
        return sum(blocks) + parts.rest
    lag = int(wiring.startswith("ladder"))
    computed, done = 0.0, [float("-inf")] * (lag + 1)
    spacing = min(parts.spacing, parts.reduce)  # a token bucket that the first of two has emptied fills up in between
    for number, seconds in enumerate(blocks):
        beside = parts.cpu if lag and number else 0.0
        computed = max(computed, done[-1 - lag]) + seconds + beside
        done.append(max(computed + parts.reduce, done[-1] + spacing))
    return parts.rest + parts.reduce + done[-1]
