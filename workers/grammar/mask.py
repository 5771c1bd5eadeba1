"""Constraints as a mask over logits. Rows are filled on the host, while the device computes the step."""

import numpy as np
import torch
from torch import Tensor

from stepladder.kernels.transfer import upload
from stepladder.workers.core import Sample
from stepladder.workers.grammar.constraint import words


def masked(logits: Tensor, samples: list[Sample]) -> Tensor:
    """Logits [R, vocab] with -inf where a sample's constraint does not let a token follow; not changed in place."""
    constrained = [(row, s) for row, s in enumerate(samples) if s.constraint]
    if not constrained:
        return logits
    mask = np.full((len(constrained), words(logits.shape[-1])), -1, dtype=np.int32)
    for at, (_, sample) in enumerate(constrained):
        assert sample.constraint
        sample.constraint.mask_rows(mask[at : at + 1], sample.unending)
    rows = upload([row for row, _ in constrained], logits.device)
    allowed = _unpacked(upload(mask, logits.device, torch.int32), logits.shape[-1])
    return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed, float("-inf")))


def _unpacked(mask: Tensor, size: int) -> Tensor:
    """Bits of int32 [R, words] as bool [R, size], the lowest of each word first."""
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    return (mask[:, :, None] >> shifts & 1).bool().flatten(1)[:, :size]
