"""A smaller model drafts, with a cache of its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import begin, whole_executor
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.executor import Executor
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafters.model import ModelDrafter
from stepladder.workers.text.tokenizer import Tokenizer
from tests.llama import write_llama
from tests.workers.speculation.serving import LIMITS, Texts, requests, serve


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("other"), seed=4, num_hidden_layers=1)


def drafter(path: Path, threshold: float = 0.0, **limits: int) -> ModelDrafter:
    own = replace(LIMITS, **limits)
    executor = whole_executor(ModelSpec.load(path), str(path), SingleRank(), own.num_blocks, own.block_size)
    return ModelDrafter(executor, own, threshold)


@pytest.mark.parametrize("max_step_tokens", [8, 64])
def test_a_model_that_drafts_for_itself_is_always_right(
    executor: Executor, plain: Texts, directory: Path, max_step_tokens: int
) -> None:
    """Greedy and sampled: the noise is the same. With eight tokens a step, prompts come in parts."""
    texts, engine = serve(executor, requests(), made := drafter(directory, max_step_tokens=max_step_tokens), 4)
    assert texts == plain and engine.stats.draft_tokens > 50
    free = [  # a drafter bars nothing, and does not see where a text ends
        replace(r, params=replace(r.params, ignore_eos=True, stop_token_ids=(), min_tokens=0, logit_bias={}))
        for r in requests()
    ]
    _, engine = serve(executor, free, drafter(directory, max_step_tokens=max_step_tokens), 4)
    assert engine.stats.accepted_tokens == engine.stats.draft_tokens > 50
    assert not made.states and made.blocks.num_free == LIMITS.num_blocks, "whoever has left leaves nothing"


def test_another_model_changes_no_text(executor: Executor, plain: Texts, other: Path) -> None:
    for threshold, limits in ((0.0, {}), (0.3, {}), (0.0, {"num_blocks": 18})):
        texts, engine = serve(executor, requests(), drafter(other, threshold, **limits), 5)
        assert texts == plain and 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens
    texts, engine = serve(executor, requests(), drafter(other), 5, num_blocks=18, prefix_caching=False)
    assert texts == plain and engine.stats.preemptions


def test_another_vocabulary_is_refused(directory: Path, tmp_path: Path) -> None:
    path = write_llama(tmp_path, vocab_size=99)
    executor = whole_executor(ModelSpec.load(directory), str(directory), SingleRank())
    speculate = SpeculateConfig(kind="model", model=str(path))
    with pytest.raises(ValueError, match=r"speculate.model has 99 tokens, the model that it drafts for 101; it must"):
        begin(executor, EngineConfig(), KvConfig(), 4096, Tokenizer, speculate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the kinds model, head, hybrid need a directory, and no other takes one"):
        SpeculateConfig(kind="model")
    with pytest.raises(ValueError, match="the kinds model, head, hybrid need a directory, and no other takes one"):
        SpeculateConfig(kind="suffix", model="x")
