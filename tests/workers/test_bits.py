"""A row has the same bits alone and in any company, in any order, behind any cut of its prompt, over taken over blocks
and after it gave up its own: with native kernels, on ranks together and apart."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from stepladder.kernels.cpu import build
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.native import NATIVE, TORCH
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.pool_forward import attention_executor
from stepladder.workers.assembly import whole_executor
from tests.llama import write_llama
from tests.random_steps import BLOCK, BLOCKS, Watched, check_steps, make_texts
from tests.ranks import run_ranks
from tests.workers.test_afd import membership, pool_of

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no native kernels here: {build.why_not()}")

TEXTS = make_texts(5)
LONGER = {"max_position_embeddings": 1024}
LONG = [text * 9 for text in TEXTS[::5]]  # attention adds a context up in parts of 512 positions


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_llama(tmp_path_factory.mktemp("bits"), seed=4, hidden_size=72, intermediate_size=150, **LONGER)
    config = json.loads((path / "config.json").read_text()) | {"dtype": request.param}
    (path / "config.json").write_text(json.dumps(config))
    return path


def together(path: Path, mesh: Mesh, steps: int, kernels: str = NATIVE, left_behind: float = float("nan")) -> None:
    """Rank 0 runs the steps, the others follow."""
    executor = whole_executor(ModelSpec.load(path), str(path), mesh, BLOCKS, BLOCK, kernels=kernels)
    if mesh.shard.rank:
        executor.follow()
        return
    watched = Watched(executor, left_behind)
    happened = check_steps(watched, TEXTS, watched.alone(TEXTS), steps)
    assert happened["taken over"] > steps / 20 and happened["preempted"] > steps / 20, happened
    executor.stop()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_row_has_the_bits_that_it_has_alone(tp: int, checkpoint: Path) -> None:
    run_ranks(tp, lambda mesh: together(checkpoint, mesh, 1000 // tp))


def test_in_contexts_of_several_parts(checkpoint: Path) -> None:
    executor = whole_executor(ModelSpec.load(checkpoint), str(checkpoint), SingleRank(), 300, BLOCK, kernels=NATIVE)
    watched = Watched(executor)
    assert max(map(len, LONG)) > 512
    check_steps(watched, LONG, watched.alone(LONG), 200)


@pytest.mark.parametrize(("attention", "ffn", "micro"), [(1, 1, 1), (1, 1, 2), (2, 2, 1), (2, 2, 2)])
def test_on_attention_and_ffn_ranks(attention: int, ffn: int, micro: int, checkpoint: Path) -> None:
    """Of two attention ranks each is company of the other, since the FFNs see the rows of both. One FFN rank, which has
    nobody to add up with, gives the bits of the whole model on one rank."""
    spec = ModelSpec.load(checkpoint)
    whole = Watched(whole_executor(spec, str(checkpoint), SingleRank(), BLOCKS, BLOCK, kernels=NATIVE))

    def serve(watched: Watched, seed: int) -> None:
        with ExitStack() as end:
            end.callback(watched.executor.stop)
            check_steps(watched, TEXTS, wanted, 200, seed)

    with pool_of(checkpoint, ffn) as pool, ThreadPoolExecutor(attention) as threads:
        engines = []
        for _ in range(attention):
            executor = attention_executor(spec, str(checkpoint), membership(spec, pool), micro, 4, NATIVE)
            executor.allocate(BLOCKS, BLOCK)
            engines.append(Watched(executor))
        wanted = (engines[0] if ffn > 1 else whole).alone(TEXTS)
        for done in [threads.submit(serve, one, seed) for seed, one in enumerate(engines)]:
            done.result()


def test_plain_torch_is_found_out(checkpoint: Path) -> None:
    """The steps above can fail."""
    with pytest.raises(AssertionError, match=r"differ by up to .* in step \d+ of seed 0: text \d+, .* tokens \d+ to"):
        together(checkpoint, SingleRank(), 1000, TORCH, left_behind=1e3)


def test_one_bit_is_found_out(checkpoint: Path) -> None:
    """Of one number of one row."""
    executor = whole_executor(ModelSpec.load(checkpoint), str(checkpoint), SingleRank(), BLOCKS, BLOCK, kernels=NATIVE)
    watched = Watched(executor)
    wanted = watched.alone(TEXTS)
    rows = wanted[3]["hidden states"].clone()
    rows[2, 5] = torch.nextafter(rows[2, 5], torch.tensor(torch.inf, dtype=rows.dtype))
    wanted[3]["hidden states"] = rows
    with pytest.raises(AssertionError, match=r"hidden states differ .* text 3, .* of these \["):
        check_steps(watched, TEXTS, wanted, 300)
