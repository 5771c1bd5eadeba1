"""A StepPlan as one list of 64-bit integers: what rank 0 broadcasts each step. Nothing is pickled.

Layout: [T, B, R, C] then tokens [T], starts [B], lengths [B], table lengths [B], rows [R], tables [C concatenated].
How tokens are drawn from the rows' logits concerns rank 0 alone and stays there.
"""

from itertools import accumulate, pairwise

from stepladder.workers.core import StepPlan

_HEADER = 4


def encode(plan: StepPlan) -> list[int]:
    """The plan as integers, without samples and scores."""
    flat = [block for table in plan.block_tables for block in table]
    header = [len(plan.tokens), len(plan.starts), len(plan.rows), len(flat)]
    return [*header, *plan.tokens, *plan.starts, *plan.lengths, *map(len, plan.block_tables), *plan.rows, *flat]


def decode(values: list[int]) -> StepPlan:
    """What `encode` was given, without samples and scores."""
    num_tokens, num_sequences, num_rows, num_blocks = values[:_HEADER]
    sizes = (_HEADER, num_tokens, num_sequences, num_sequences, num_sequences, num_rows, num_blocks)
    _, tokens, starts, lengths, table_lengths, rows, flat = (
        values[a:b] for a, b in pairwise(accumulate(sizes, initial=0))
    )
    tables = [flat[a:b] for a, b in pairwise(accumulate(table_lengths, initial=0))]
    return StepPlan(tokens, starts, lengths, tables, rows)
