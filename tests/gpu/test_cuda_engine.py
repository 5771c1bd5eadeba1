"""What only a GPU can show of the engine: real CUDA graphs, steps queued ahead, and what they gain.

    python -m pytest -m gpu tests/gpu -s

on a machine with a GPU; with two, also the all-reduces of NCCL inside the graphs. No Ray is needed.
"""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stepladder.parallel.mesh import SingleRank, join
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Request, SamplingParams, StepPlan
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.graphs import CudaCapture
from stepladder.workers.sampler import Drawn
from stepladder.workers.scheduler import Scheduler, SchedulerConfig
from tests.decoding import CONFIG, SIZE, WIRINGS, compare, requests, serve
from tests.families import write_family
from tests.llama import write_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA GPU: python -m pytest -m gpu tests/gpu -s, where there is one",
    ),
]
CUDA = torch.device("cuda")


def executor_of(spec: ModelSpec, path: Path, graphs: bool, blocks: int = 30, size: int = SIZE) -> Executor:
    return whole_executor(
        spec, str(path), SingleRank(CUDA), blocks, size, capture=CudaCapture(CUDA) if graphs else None
    )


@pytest.mark.parametrize("residual", WIRINGS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_graphs_equal_ordinary_steps(untied: Path, residual: str, dtype: torch.dtype, bound: float) -> None:
    spec = replace(ModelSpec.load(untied), residual=residual, dtype=dtype)
    assert compare(spec, untied, CudaCapture(CUDA), bound)(SingleRank(CUDA)) > 2


@pytest.mark.parametrize("family", ["mistral", "qwen3", "cohere"])
def test_windows_are_masked(tmp_path: Path, family: str) -> None:
    path = write_family(tmp_path, family)
    spec = replace(ModelSpec.load(path), dtype=torch.float64)
    compare(spec, path, CudaCapture(CUDA), 1e-12)(SingleRank(CUDA))


def test_texts_are_the_same_with_graphs_and_lookahead(untied: Path, prompts: list[list[int]]) -> None:
    spec, made = replace(ModelSpec.load(untied), dtype=torch.float64), requests(prompts)
    texts = [
        serve(Engine(replace(CONFIG, lookahead=lookahead), executor_of(spec, untied, graphs)), made)
        for lookahead in (0, 1)
        for graphs in (False, True)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize("graphs", [False, True])
def test_queueing_a_step_waits_for_nothing(untied: Path, prompts: list[list[int]], graphs: bool) -> None:
    executor = executor_of(ModelSpec.load(untied), untied, graphs)

    class Strict:
        def submit(self, plan: StepPlan) -> Drawn:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return executor.submit(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    serve(Engine(replace(CONFIG, lookahead=1), executor), requests(prompts))  # recording a graph does wait
    assert all(serve(Engine(replace(CONFIG, lookahead=1), Strict()), requests(prompts)).values())


def test_the_next_step_is_queued_before_the_last_is_done(untied: Path) -> None:
    executor, scheduler = (
        executor_of(ModelSpec.load(untied), untied, graphs=True),
        Scheduler(replace(CONFIG, lookahead=1)),
    )
    for name in "abc":
        scheduler.add(Request(id=name, prompt=(1, 2, 3), params=SamplingParams(max_tokens=30, ignore_eos=True)))
    for _ in range(3):  # the prefill, then the recording of the graph
        scheduler.commit(executor.submit(scheduler.schedule()).result())
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    steps = [executor.submit(scheduler.schedule()) for _ in range(2)]
    assert [step._landing._landed.query() for step in steps] == [False, False]  # type: ignore[union-attr]
    assert [len(scheduler.commit(step.result())) for step in steps] == [3, 3]


def test_what_they_gain(tmp_path: Path) -> None:
    """Decode steps per second of a small model, batch 16: with each of the two, with both, with neither."""
    shapes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "head_dim": 64}
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    path = write_llama(tmp_path, vocab_size=32000, **shapes, **heads)
    spec = replace(ModelSpec.load(path), dtype=torch.bfloat16)
    config = SchedulerConfig(max_sequences=16, max_step_tokens=2048, max_model_len=1024, num_blocks=2048)
    executors = {
        graphs: executor_of(spec, path, graphs, config.num_blocks, config.block_size) for graphs in (False, True)
    }
    ways = {
        f"graphs={graphs} lookahead={lookahead}": Engine(replace(config, lookahead=lookahead), executors[graphs])
        for graphs in (False, True)
        for lookahead in (0, 1)
    }
    rounds = [{name: steps_per_second(engine) for name, engine in ways.items()} for _ in range(4)][1:]
    rates = {name: median(one[name] for one in rounds) for name in ways}
    print(json.dumps({"machine": torch.cuda.get_device_name(), "decode steps per second, batch 16": rates}))
    assert rates["graphs=True lookahead=1"] > rates["graphs=False lookahead=0"]


def steps_per_second(engine: Engine) -> float:
    engine.scheduler.blocks.forget()
    params = SamplingParams(max_tokens=200, temperature=0.8, ignore_eos=True)
    for index in range(16):
        engine.add(Request(id=str(index), prompt=tuple(range(index, index + 64)), params=params))
    engine.step()
    began, steps = perf_counter(), 0
    while engine.has_work:
        engine.step()
        steps += 1
    return steps / (perf_counter() - began)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_reduces_inside_graphs(untied: Path, prompts: list[list[int]]) -> None:
    """NCCL's stream is forked to and joined from; texts are those of one rank."""
    spec = replace(ModelSpec.load(untied), dtype=torch.float64)
    wanted = serve(Engine(CONFIG, executor_of(spec, untied, graphs=False)), requests(prompts))
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    results = mp.get_context("spawn").Queue()
    mp.spawn(_two_ranks, (server.port, untied, prompts, results), nprocs=2)
    assert results.get(timeout=10) == wanted


def _two_ranks(rank: int, port: int, path: Path, prompts: list[list[int]], results: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    mesh = join(store, Shard(rank, 2), f"cuda:{rank}", timeout=timedelta(seconds=60))
    for residual in WIRINGS:
        spec = replace(ModelSpec.load(path), residual=residual, dtype=torch.float64)
        assert compare(spec, path, CudaCapture(mesh.device), 1e-12)(mesh) > 2
    spec = replace(ModelSpec.load(path), dtype=torch.float64)
    executor = whole_executor(spec, str(path), mesh, 30, SIZE, capture=CudaCapture(mesh.device))
    if rank:
        executor.follow()
    else:
        results.put(serve(Engine(replace(CONFIG, lookahead=1), executor), requests(prompts)))
        executor.stop()
    torch.cuda.synchronize()
    mesh.close()
