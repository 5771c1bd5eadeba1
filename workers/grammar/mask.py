"""Constraints as a mask over logits. Rows are filled on the host, while the device computes the step."""

import numpy as np
import torch
from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.workers.core import Sample
from stepladder.workers.grammar.constraint import words


def masked(logits: Tensor, samples: list[Sample]) -> Tensor:
    """Logits [R, vocab] with -inf where a sample's constraint does not let a token follow; not changed in place.

    Args:
        samples: each has a row, and one for each drafted token.
    """
    rows, fill, first = list[int](), [], 0
    for sample in samples:
        count = 1 + len(sample.draft)
        if sample.constraint:
            fill.append((sample, slice(len(rows), len(rows) + count)))
            rows.extend(range(first, first + count))
        first += count
    if not rows:
        return logits
    mask = np.full((len(rows), words(logits.shape[-1])), -1, dtype=np.int32)
    for sample, some in fill:
        assert sample.constraint
        sample.constraint.mask_rows(mask[some], sample.unending, sample.draft)
    at = upload(rows, logits.device)
    allowed = _unpacked(upload(mask, logits.device, torch.int32), logits.shape[-1])
    return logits.index_copy(0, at, logits[at].masked_fill(~allowed, float("-inf")))


def _unpacked(mask: Tensor, size: int) -> Tensor:
    """Bits of int32 [R, words] as bool [R, size], the lowest of each word first."""
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    return (mask[:, :, None] >> shifts & 1).bool().flatten(1)[:, :size]
