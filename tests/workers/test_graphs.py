"""Decode steps replayed from a recording equal those launched kernel by kernel, to the rounding of other shapes.

CUDA graphs themselves need a GPU (tests/gpu); here `tests.recording` does on a CPU what they do.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.core import StepPlan
from stepladder.workers.engine import Engine
from stepladder.workers.graphs import MOST_POSITIONS, Capture, DecodeGraphs
from stepladder.workers.sampler import Drawn
from tests.decoding import BLOCKS, CONFIG, SIZE, WIRINGS, compare, requests, serve
from tests.families import write_family
from tests.ranks import run_ranks
from tests.recording import WaitsForNothing, call, record


@pytest.mark.parametrize(("tp", "capture"), [(1, record), (2, call)])
@pytest.mark.parametrize("residual", WIRINGS)
def test_replayed_steps_equal_ordinary_ones(untied: Path, residual: str, tp: int, capture: Capture) -> None:
    """Ten steps take four batch sizes and two lengths at most; so recordings are replayed for other sequences."""
    spec = replace(ModelSpec.load(untied), residual=residual, dtype=torch.float64)
    assert set(run_ranks(tp, compare(spec, untied, capture, bound=1e-13))) <= {3, 4, 5}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "cohere"])
def test_windows_are_masked(tmp_path: Path, family: str) -> None:
    path = write_family(tmp_path, family)
    spec = replace(ModelSpec.load(path), dtype=torch.float64)
    compare(spec, path, record, bound=1e-13)(SingleRank())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(untied: Path, dtype: torch.dtype) -> None:
    spec = replace(ModelSpec.load(untied), dtype=dtype)
    compare(spec, untied, record, bound=1e-5 if dtype == torch.float32 else 0.05)(SingleRank())


def test_a_recording_freezes_what_was_read_on_the_host() -> None:
    """Otherwise the tests above would prove nothing."""
    x = torch.tensor([3.0, 1.0])
    honest, frozen = record(lambda: x + x.max()), record(lambda: x + x.max().item())
    x.copy_(torch.tensor([5.0, 1.0]))
    assert honest().tolist() == [10, 6] and frozen().tolist() == [8, 4]


def test_which_steps_fit(untied: Path) -> None:
    executor = whole_executor(ModelSpec.load(untied), str(untied), SingleRank(), BLOCKS, SIZE, capture=call)
    graphs = executor.forward.graphs
    assert isinstance(graphs, DecodeGraphs)
    assert graphs.fits(StepPlan([5, 6], [9, 0], [1, 1], [[0, 1, 2], [3]], [0, 1]))
    assert not graphs.fits(StepPlan([5, 6, 7], [9, 0], [1, 2], [[0, 1, 2], [3]], [0, 2])), "a prefill"
    assert not graphs.fits(StepPlan([5, 6], [9, 0], [1, 1], [[0, 1, 2], [3]], [0])), "a chunk of one token"
    assert not graphs.fits(StepPlan([5, 6], [9], [2], [[0, 1, 2]], [0, 1])), "a prompt that is scored"
    long = MOST_POSITIONS // SIZE
    assert graphs.fits(StepPlan([5], [9], [1], [[0] * long], [0]))
    assert not graphs.fits(StepPlan([5, 6], [9, 9], [1, 1], [[0] * long, [1]], [0, 1])), "too long for its batch"


@pytest.mark.parametrize("tp", [1, 2])
def test_texts_are_the_same_with_recordings_and_lookahead(untied: Path, prompts: list[list[int]], tp: int) -> None:
    made, spec = requests(prompts), ModelSpec.load(untied)

    def rank_main(mesh: Mesh) -> tuple[dict[str, list[int]], int]:
        executor = whole_executor(spec, str(untied), mesh, 30, SIZE, capture=call)
        assert executor.forward.graphs is not None
        if mesh.shard.rank:
            executor.follow()
            return {}, len(executor.forward.graphs._recorded)
        engine = Engine(replace(CONFIG, lookahead=1), executor)
        tokens = serve(engine, made)
        executor.stop()
        assert engine.stats.preemptions > 0
        return tokens, len(executor.forward.graphs._recorded)

    wanted = serve(Engine(CONFIG, whole_executor(spec, str(untied), SingleRank(), 30, SIZE)), made)
    ranks = run_ranks(tp, rank_main)
    assert ranks[0][0] == wanted
    assert len({recorded for _, recorded in ranks}) == 1 and ranks[0][1] > 3


@pytest.mark.parametrize("capture", [None, call])
def test_queueing_a_step_waits_for_nothing(untied: Path, prompts: list[list[int]], capture: Capture | None) -> None:
    executor = whole_executor(ModelSpec.load(untied), str(untied), SingleRank(), 30, SIZE, capture=capture)

    class Strict:
        def submit(self, plan: StepPlan) -> Drawn:
            with WaitsForNothing():
                return executor.submit(plan)

    tokens = serve(Engine(replace(CONFIG, lookahead=1), Strict()), requests(prompts))
    assert all(tokens.values())


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.max().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_what_waits_is_found(waiting: Callable[[Tensor], object]) -> None:
    with torch.inference_mode(), WaitsForNothing(), pytest.raises(AssertionError):
        waiting(torch.ones(3))


def test_the_options(untied: Path) -> None:
    cpu, cuda, spec, kv = torch.device("cpu"), torch.device("cuda"), ModelSpec.load(untied), KvConfig(tokens=4096)
    assert [EngineConfig().graphs_on(device) for device in (cpu, cuda)] == [False, True]
    assert not EngineConfig(cuda_graphs=False).graphs_on(cuda)
    with pytest.raises(ValueError, match=r"engine\.cuda_graphs is true, but this engine runs on cpu; set it to null"):
        EngineConfig(cuda_graphs=True).graphs_on(cpu)
    for given, on_cpu, on_cuda in ((None, 0, 1), (0, 0, 0), (1, 1, 1)):
        limits = [EngineConfig(lookahead=given).limits(spec, kv, 4096, device) for device in (cpu, cuda)]
        assert [one.lookahead for one in limits] == [on_cpu, on_cuda]
    with pytest.raises(ValueError, match=r"engine\.lookahead is 2; it must be 0, 1 or null"):
        EngineConfig(lookahead=2)
