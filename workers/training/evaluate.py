"""Bits per byte of whole documents under a sliding window."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer

BATCH = 8


class Window(NamedTuple):
    """tokens: inputs and, shifted by one, targets; counted: index of the first target that counts."""

    tokens: Sequence[int]
    counted: int


def bits_per_byte(model: Transformer, documents: Iterable[Sequence[int]], num_bytes: int, context: int) -> float:
    """Cost of `documents` divided by their size.

    Every document starts after an end-of-text token and ends with one, whose cost is included. Windows of `context`
    tokens advance by half their length and count their newer half, so that each token is counted once and, beyond the
    first window, sees at least half a window of its own document.

    Args:
        documents: token ids [end of text, ..., end of text] each.
        num_bytes: length of all documents in UTF-8, without the end-of-text tokens.
    """
    nats = sum(_nats(model, group) for group in batches(documents, context))
    return nats / math.log(2) / num_bytes


def batches(documents: Iterable[Sequence[int]], context: int) -> Iterator[list[Window]]:
    """The windows of all documents, equally long ones together."""
    by_length: dict[int, list[Window]] = defaultdict(list)
    for document in documents:
        for window in windows(document, context):
            by_length[len(window.tokens)].append(window)
    for group in by_length.values():
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


def windows(document: Sequence[int], context: int) -> list[Window]:
    """Cut one document so that each of its tokens but the first is a counted target exactly once."""
    targets, stride = len(document) - 1, context // 2
    starts = range(0, max(targets - context, 0) + stride, stride)
    return [Window(document[start : start + context + 1], start and context - stride) for start in starts]


@torch.inference_mode()
def _nats(model: Transformer, group: Sequence[Window]) -> float:
    """Summed cost of the counted targets of equally long windows."""
    device = model.embedding.weight.device
    tokens = torch.tensor([window.tokens for window in group], device=device)
    batch, length = len(group), tokens.shape[1] - 1
    hidden = model(tokens[:, :-1].reshape(-1), WholeSequences(batch, length, device)).view(batch, length, -1)
    total = 0.0
    for states, targets, window in zip(hidden, tokens[:, 1:], group, strict=True):
        logits = model.logits(states[window.counted :]).float()
        total += F.cross_entropy(logits, targets[window.counted :], reduction="sum").item()
    return total
