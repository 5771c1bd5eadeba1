"""With native kernels an engine draws the same tokens alone, in company, in any chunks, after preemption and replay."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.kernels.cpu import build
from stepladder.kernels.cpu.native import DTYPES
from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.native import AUTO, NATIVE, TORCH
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.config import EngineConfig
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.limits import SchedulerConfig
from tests.llama import write_llama

COUNT, LENGTH, WATCHED = 16, 24, 7
SHAPES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 8, "head_dim": 16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("invariant"), seed=3, **SHAPES)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def executor(directory: Path, request: pytest.FixtureRequest) -> Executor:
    if why := build.why_not():
        pytest.skip(f"no native kernels here: {why}")
    spec = replace(ModelSpec.load(directory), dtype=request.param)
    return whole_executor(spec, str(directory), SingleRank(), 128, 8, kernels=NATIVE)


def requests() -> list[Request]:
    draw = random.Random(11)
    return [
        Request(
            id=str(index),
            prompt=tuple(draw.randrange(101) for _ in range(draw.randrange(3, 90))),
            params=SamplingParams(max_tokens=LENGTH, temperature=(index % 2) * 0.9, seed=index, ignore_eos=True),
        )
        for index in range(COUNT)
    ]


class Watching:
    """The executor, keeping the logits of one request's samples: tokens alone would hide small differences."""

    def __init__(self, executor: Executor, seed: int) -> None:
        self.executor, self.seed, self.logits = executor, seed, {}

    def submit(self, plan: Any) -> Any:
        _, logits = self.executor._forward(plan)
        for sample in plan.samples:
            if sample.params.seed == self.seed:
                self.logits[sample.position] = logits[sample.row].clone()
        return self.executor.submit(plan)


def serve(executor: Executor, made: list[Request], **limits: Any) -> tuple[dict[str, list[int]], dict, int]:
    """Tokens of every request, logits of the watched one by position, and the number of preemptions."""
    config = SchedulerConfig(
        **{"max_model_len": 128, "num_blocks": 128, "block_size": 8, "max_step_tokens": 512, **limits}
    )
    watching = Watching(executor, WATCHED)
    engine, tokens = Engine(config, watching), {request.id: list(request.output) for request in made}
    for request in made:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.id].extend(output.tokens)
    return tokens, watching.logits, engine.stats.preemptions


def test_company_chunks_preemption_and_replay_change_nothing(executor: Executor) -> None:
    made = requests()
    watched = made[WATCHED]
    alone, logits, _ = serve(executor, [watched])
    everyone = {request.id: serve(executor, [request])[0][request.id] for request in made}

    def same(tokens: dict[str, list[int]], seen: dict[int, torch.Tensor]) -> None:
        assert tokens == {name: everyone[name] for name in tokens}
        assert seen and all(torch.equal(row, logits[position]) for position, row in seen.items())

    assert alone[watched.id] == everyone[watched.id]
    for chunk in (16, 23, 512):
        tokens, seen, _ = serve(executor, made, max_step_tokens=chunk, max_sequences=16)
        same(tokens, seen)
    for chunk in (1, 7, 512):
        same(*serve(executor, [watched], max_step_tokens=chunk, max_sequences=1)[:2])
    tokens, seen, preemptions = serve(executor, made, num_blocks=24, prefix_caching=False)
    same(tokens, seen)
    assert preemptions > 0
    for sent in (1, 10, LENGTH - 1):
        replay = replace(watched, output=tuple(everyone[watched.id][:sent]))
        same(*serve(executor, [replay, *made[:3]])[:2])


def test_plain_torch_does_depend_on_the_batch(directory: Path) -> None:
    """Otherwise the test above would prove nothing."""
    spec = ModelSpec.load(directory)
    executor = whole_executor(spec, str(directory), SingleRank(), 128, 8, kernels=TORCH)
    alone = serve(executor, [requests()[WATCHED]])[1]
    batched = serve(executor, requests(), max_step_tokens=23, max_sequences=16)[1]
    assert any(not torch.equal(row, alone[position]) for position, row in batched.items())


def test_it_is_refused_where_it_cannot_be(directory: Path) -> None:
    spec = replace(ModelSpec.load(directory), dtype=torch.float64)
    insisting = EngineConfig(batch_invariant=True)
    assert (insisting.kernels, insisting.wanted_kernels, EngineConfig().wanted_kernels) == (AUTO, NATIVE, AUTO)
    with pytest.raises(
        ValueError, match="need native kernels: they compute in float32, bfloat16 or float16, not in fl"
    ):
        whole_executor(spec, str(directory), SingleRank(), 8, 8, kernels=insisting.wanted_kernels)
    with pytest.raises(ValueError, match=r"engine\.batch_invariant needs native kernels, but engine\.kernels is torch"):
        EngineConfig(batch_invariant=True, kernels=TORCH)
