"""A StepPlan as one list of 64-bit integers: what rank 0 broadcasts each step. Nothing is pickled.

Layout: [number, T, B, R, C] then tokens [T], starts [B], lengths [B], rows [R], and of each block table: the place of
the table in the last plan that it continues or -1 [B], and how many blocks it has besides that one's [B]; these blocks
[C concatenated]. A context of thousands of tokens so costs two integers a step, not hundreds.
How tokens are drawn from the rows' logits concerns rank 0 alone and stays there.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from stepladder.workers.core import StepPlan

_HEADER = 5
_NEW = -1
Tables = Sequence[list[int]]


def encode(plan: StepPlan, before: Tables = (), number: int = 0) -> list[int]:
    """The plan as integers, without samples and scores.

    Args:
        before: the block tables of the last plan, which the receiver knows. number: of this plan.
    """
    sources = _continued(plan.block_tables, before)
    new = [t if s == _NEW else t[len(before[s]) :] for t, s in zip(plan.block_tables, sources, strict=True)]
    flat = [block for blocks in new for block in blocks]
    header = [number, len(plan.tokens), len(plan.starts), len(plan.rows), len(flat)]
    return [*header, *plan.tokens, *plan.starts, *plan.lengths, *plan.rows, *sources, *map(len, new), *flat]


def decode(values: list[int], before: Tables = (), number: int = 0) -> StepPlan:
    """What `encode` was given, without samples and scores."""
    assert values[0] == number, f"plan {values[0]} came, but {number} is the next one: block tables are not known"
    _, num_tokens, num_sequences, num_rows, num_blocks = values[:_HEADER]
    sizes = (_HEADER, num_tokens, *[num_sequences] * 2, num_rows, *[num_sequences] * 2, num_blocks)
    _, tokens, starts, lengths, rows, sources, counts, flat = (
        values[a:b] for a, b in pairwise(accumulate(sizes, initial=0))
    )
    new = [flat[a:b] for a, b in pairwise(accumulate(counts, initial=0))]
    tables = [n if s == _NEW else before[s] + n for s, n in zip(sources, new, strict=True)]
    return StepPlan(tokens, starts, lengths, tables, rows)


def _continued(tables: Tables, before: Tables) -> list[int]:
    """For each table the place of the one in `before` that it begins with, or _NEW. The order of sequences stays from
    step to step but for those that end or begin, so that one look further on is nearly always enough."""
    found, place = [], 0
    for table in tables:
        at = next((i for i in range(place, len(before)) if _begins_with(table, before[i])), _NEW)
        place = place if at == _NEW else at + 1
        found.append(at)
    return found


def _begins_with(table: list[int], known: list[int]) -> bool:
    size = len(known)
    return 0 < size <= len(table) and table[size - 1] == known[-1] and table[:size] == known


class PlanCodec:
    """One end of the way that plans take from rank 0 to its followers; both ends remember the last plan's tables.

    Every plan has a number, so that an end that has missed one says so instead of reading other blocks.
    """

    def __init__(self) -> None:
        self._tables: list[list[int]] = []
        self._number = 0

    def encode(self, plan: StepPlan) -> list[int]:
        values = encode(plan, self._tables, self._number)
        self._note(plan)
        return values

    def decode(self, values: list[int]) -> StepPlan:
        plan = decode(values, self._tables, self._number)
        self._note(plan)
        return plan

    def _note(self, plan: StepPlan) -> None:
        """Plans own their tables: nobody changes one that has been planned. A plan without tokens changes nothing."""
        self._number += 1
        if plan.tokens:
            self._tables = plan.block_tables
