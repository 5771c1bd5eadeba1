"""The bundled model computes what it computed when `same_bits.json` was written: tokens, and logits bit for bit.

Bits depend on the processor and on torch's kernels; elsewhere than where they were written, the logits must be close.
`python -m tests.test_same_bits` writes the file anew, for a change that is meant to round in another way.
"""

import hashlib
import json
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.model import Transformer
from stepladder.parallel.native import NATIVE, TORCH, choose
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.text.tokenizer import Tokenizer
from tests.ranks import run_ranks
from tests.workers.test_afd import engine as attention_engine
from tests.workers.test_afd import membership, pool_of

MODEL = Path(__file__).parent.parent / "launch" / "demo_model"
WRITTEN = Path(__file__).with_name("same_bits.json")
LIMITS = SchedulerConfig(max_sequences=8, max_step_tokens=64, max_model_len=256, num_blocks=128, block_size=16)
TEXTS = (
    "def main():\n    ",
    "import os\n",
    "class Point:\n    def __init__(self, x, y):\n        ",
    "for i in range(10):\n",
)
SAMPLED = 16  # logits kept as numbers, for other machines


def machine() -> str:
    """What the bits depend on: the processor, its cache included, and torch."""
    path, kept = Path("/proc/cpuinfo"), ("model name", "cpu family", "model", "stepping", "cache size")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    fields = dict((part.strip() for part in line.split(":", 1)) for line in lines)
    found = [fields[name] for name in kept if name in fields] or [platform.machine()]
    return "; ".join([*found, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"])


def requests() -> list[Request]:
    """Greedy, with the log-probabilities of prompts and of the text."""
    tokenizer, params = (
        Tokenizer(str(MODEL)),
        SamplingParams(max_tokens=40, temperature=0.0, logprobs=3, ignore_eos=True),
    )
    prompts = [tuple(tokenizer.encode(text * times)) for text in TEXTS for times in (1, 2)]
    return [Request(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts)]


def digest(values: bytes) -> str:
    return hashlib.sha256(values).hexdigest()


def serve(engine: Engine, asked: Sequence[Request]) -> dict[str, Any]:
    """Tokens of each request, and the log-probabilities of all."""
    tokens: dict[str, list[int]] = {request.id: [] for request in asked}
    scores: dict[str, list[float]] = {request.id: [] for request in asked}
    for request in asked:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.tokens
            scores[output.id] += [v for one in output.logprobs or () for v in (one.logprob, *one.top_logprobs)]
    flat = torch.tensor([value for request in asked for value in scores[request.id]], dtype=torch.float64)
    return {"tokens": [tokens[request.id] for request in asked], **numbers(flat)}


def numbers(values: Tensor) -> dict[str, Any]:
    flat = values.flatten()
    chosen = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]
    return {"digest": digest(values.contiguous().numpy().tobytes()), "sampled": chosen.double().tolist()}


def whole(tp: int) -> dict[str, Any]:
    spec, asked = ModelSpec.load(MODEL), requests()
    if tp == 1:
        return serve(
            Engine(LIMITS, whole_executor(spec, str(MODEL), SingleRank(), LIMITS.num_blocks, LIMITS.block_size)), asked
        )

    def rank_main(mesh: Mesh) -> dict[str, Any] | None:
        executor = whole_executor(spec, str(MODEL), mesh, LIMITS.num_blocks, LIMITS.block_size)
        if mesh.shard.rank:
            executor.follow()
            return None
        result = serve(Engine(LIMITS, executor), asked)
        executor.stop()
        return result

    result = run_ranks(tp, rank_main)[0]
    assert result is not None
    return result


def apart(attention: int) -> dict[str, Any]:
    """Each attention rank has every n-th request."""
    spec, asked = ModelSpec.load(MODEL), requests()
    results: dict[int, dict[str, Any]] = {}

    def one(index: int, pool: Any) -> None:
        engine = attention_engine(spec, MODEL, membership(spec, pool), 1)
        results[index] = serve(engine, asked[index::attention])
        engine.executor.stop()  # type: ignore[attr-defined]

    with pool_of(MODEL, 1) as pool:
        threads = [threading.Thread(target=one, args=(index, pool), daemon=True) for index in range(attention)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    return {str(index): results[index] for index in range(attention)}


@torch.inference_mode()
def logits(tp: int, kernels: str) -> dict[str, Any]:
    """Of every position of a prompt, without an engine."""
    spec = ModelSpec.load(MODEL)
    tokens = torch.tensor(requests()[5].prompt[:24])

    def rank_main(mesh: Mesh) -> Tensor | None:
        model = Transformer(spec, mesh.shard, mesh.all_reduce).requires_grad_(False)
        load_weights(model, str(MODEL))
        choose(model, kernels)
        return mesh.gather(model.logits(model(tokens, WholeSequences(1, len(tokens)))))

    found = rank_main(SingleRank()) if tp == 1 else run_ranks(tp, torch.inference_mode()(rank_main))[0]
    assert found is not None
    return numbers(found)


CASES = {
    "tp=1": lambda: whole(1),
    "tp=2": lambda: whole(2),
    "1A1F": lambda: apart(1),
    "2A1F": lambda: apart(2),
    "logits tp=1": lambda: logits(1, TORCH),
    "logits tp=2": lambda: logits(2, TORCH),
    "logits tp=1 native": lambda: logits(1, NATIVE),
    "logits tp=2 native": lambda: logits(2, NATIVE),
}


def same(found: Any, written: Any, exact: bool) -> None:
    """Tokens alike; logits by their bits where `exact`, else nearly."""
    if "digest" not in written:
        assert found.keys() == written.keys()
        for key, inner in written.items():
            same(found[key], inner, exact)
        return
    assert found.get("tokens") == written.get("tokens")
    assert found["sampled"] == pytest.approx(written["sampled"], rel=1e-4, abs=1e-4)
    if exact:
        assert found["digest"] == written["digest"], "other bits than before"


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_before(case: str) -> None:
    written = json.loads(WRITTEN.read_text())
    same(CASES[case](), written["cases"][case], exact=machine() == written["machine"])


def test_other_tokens_and_other_bits_are_found() -> None:
    written = {"tokens": [[1, 2]], **numbers(torch.tensor([1.0, 2.0]))}
    same(written, written, exact=True)
    for planted in ({"tokens": [[1, 3]]}, {"digest": "0"}, {"sampled": [1.0, 2.1]}):
        with pytest.raises(AssertionError):
            same(written | planted, written, exact=True)
    same(written | {"digest": "0"}, written, exact=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    WRITTEN.write_text(json.dumps({"machine": machine(), "cases": {name: run() for name, run in CASES.items()}}) + "\n")
