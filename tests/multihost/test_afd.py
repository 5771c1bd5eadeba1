"""Attention on one host, FFNs on the other, submitted as a Ray job: the same API and the same texts."""

from pathlib import Path

import pytest

from parallel.spec import ModelSpec
from tests.multihost.test_serving import MAX_TOKENS, MODEL, PROMPTS, alone, deployed
from workers.text import Tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.multihost, pytest.mark.timeout(240)]


def test_attention_and_ffn_on_two_hosts_answer_as_one_process_does(possible: None, tmp_path: Path) -> None:
    """And every layer's rows go over the link between them, to the FFN and back."""
    with deployed(2, tmp_path, "layout=afd layout.attention=1 layout.ffn=1") as deployment:
        second = deployment.hosts[1]
        assert deployment.ranks() == [1, 1]
        before = second.traffic
        texts = [deployment.ask(second, prompt) for prompt in PROMPTS]
        after = second.traffic
    assert texts == alone(PROMPTS) and len(set(texts)) == len(PROMPTS)
    spec, tokenizer = ModelSpec.load(MODEL), Tokenizer(MODEL)
    tokens = sum(len(tokenizer.encode(prompt, True)) + MAX_TOKENS - 1 for prompt in PROMPTS)
    least = spec.num_layers * tokens * spec.hidden_size * 4
    assert min(after.sent - before.sent, after.received - before.received) >= least > 5e6
