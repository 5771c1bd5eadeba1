"""Bits per byte against the plain definition."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.workers.training.evaluate import bits_per_byte, windows
from tests.workers.test_trainer import SPEC


@given(length=st.integers(2, 60), half=st.integers(1, 10))
def test_every_token_but_the_first_is_counted_once_with_half_a_window_before_it(length: int, half: int) -> None:
    counted: list[int] = []
    for window in windows(range(length), 2 * half):
        assert len(window.tokens) <= 2 * half + 1
        assert window.counted == (half if window.tokens[0] else 0)
        counted.extend(window.tokens[window.counted + 1 :])
    assert counted == list(range(1, length))


def test_bits_per_byte_is_the_cost_of_each_token_in_its_window() -> None:
    model = Transformer(SPEC)
    init_weights(model, SPEC, seed=2)
    for parameter in model.parameters():
        parameter.data *= 5
    generator = torch.Generator().manual_seed(4)
    documents = [torch.randint(64, (n,), generator=generator).tolist() for n in (2, 9, 20, 33, 50, 50, 50)]
    expected = 0.0
    for document in documents:
        for window in windows(document, 16):
            ids = torch.tensor(window.tokens)
            logits = model.logits(model(ids[:-1], WholeSequences(1, len(ids) - 1)))
            costs = F.cross_entropy(logits, ids[1:], reduction="none")
            expected += costs[window.counted :].sum().item() / math.log(2)
    assert abs(bits_per_byte(model, documents, 1000, 16) - expected / 1000) < 1e-4
