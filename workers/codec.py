"""A StepPlan as one list of 64-bit integers: what rank 0 broadcasts each step. Nothing is pickled.

Layout: [T, B, S, C] then tokens [T], starts [B], lengths [B], table lengths [B], tables [C concatenated],
and five integers per sample. Floats travel as the bits of a double.
"""

import struct
from itertools import accumulate, pairwise

from workers.core import Sample, StepPlan

_HEADER = 4
_SAMPLE = len(Sample._fields)


def encode(plan: StepPlan) -> list[int]:
    """The plan as integers."""
    flat = [block for table in plan.block_tables for block in table]
    samples = [
        value for s in plan.samples for value in (s.row, s.position, s.seed, _bits(s.temperature), _bits(s.top_p))
    ]
    header = [len(plan.tokens), len(plan.starts), len(plan.samples), len(flat)]
    return [*header, *plan.tokens, *plan.starts, *plan.lengths, *map(len, plan.block_tables), *flat, *samples]


def decode(values: list[int]) -> StepPlan:
    """What `encode` was given."""
    num_tokens, num_sequences, num_samples, num_blocks = values[:_HEADER]
    sizes = (_HEADER, num_tokens, num_sequences, num_sequences, num_sequences, num_blocks, num_samples * _SAMPLE)
    _, tokens, starts, lengths, table_lengths, flat, samples = (
        values[a:b] for a, b in pairwise(accumulate(sizes, initial=0))
    )
    tables = [flat[a:b] for a, b in pairwise(accumulate(table_lengths, initial=0))]
    wanted = [_sample(samples[i : i + _SAMPLE]) for i in range(0, len(samples), _SAMPLE)]
    return StepPlan(tokens, starts, lengths, tables, wanted)


def _sample(values: list[int]) -> Sample:
    row, position, seed, temperature, top_p = values
    return Sample(row, position, seed, _float(temperature), _float(top_p))


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
