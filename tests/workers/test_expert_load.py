"""How evenly experts are used, counted where tokens are routed."""

from pathlib import Path

import pytest
import torch

from stepladder.parallel.balance import place_of
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.parallel.native import NATIVE, TORCH, choose
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.expert_load import ExpertLoad
from tests.families import write_family
from tests.llama import write_llama


@pytest.mark.parametrize("kernels", [TORCH, NATIVE])
def test_every_choice_of_every_layer_counts(kernels: str, tmp_path: Path) -> None:
    spec = ModelSpec.load(write_family(tmp_path, "qwen2-moe"))
    assert spec.experts
    model = Transformer(spec)
    load_weights(model, tmp_path)
    choose(model, kernels)
    chosen = torch.zeros(spec.experts.count, dtype=torch.int64)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module._count = lambda some, count=module._count: (chosen.add_(some.bincount(minlength=6)), count(some))  # type: ignore[method-assign, misc]
    with torch.inference_mode():
        for length in (20, 3):
            model(torch.randint(0, 101, (length,)), WholeSequences(1, length))
    figures = ExpertLoad()
    figures.take_load(model)
    assert figures.expert_tokens == chosen.tolist()
    assert sum(figures.expert_tokens) == 23 * spec.experts.per_token * len(spec.experts.layers)
    assert figures.expert_imbalance == max(figures.expert_tokens) / (sum(figures.expert_tokens) / 6) > 1
    assert figures.expert_rank_imbalance == 1.0 and figures.expert_tokens_dropped == 0


def test_ranks_with_whole_experts_have_those_of_theirs(tmp_path: Path) -> None:
    spec = ModelSpec.load(write_family(tmp_path, "mixtral"))
    model = Transformer(spec, place_of(spec, Shard(0, 2), whole_experts=True))
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.load += torch.tensor([4, 0, 0, 0, 0])
    figures = ExpertLoad()
    figures.take_load(model)
    assert figures.expert_tokens == [12, 0, 0, 0, 0]
    assert (figures.expert_imbalance, figures.expert_rank_imbalance) == (5.0, 2.0)


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    figures = ExpertLoad()
    figures.take_load(Transformer(ModelSpec.load(write_llama(tmp_path))))
    assert figures == ExpertLoad()
    with pytest.raises(ValueError, match=r"layout\.experts is whole, but this model has no experts"):
        place_of(ModelSpec.load(tmp_path), Shard(0, 2), whole_experts=True)
