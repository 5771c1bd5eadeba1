"""Our engine as such a process: `python -m stepladder.launch.bench.engine.own_process MODEL DTYPE THREADS`.

It says more than others: {"seconds": ..., "steps": [[rows, rows that logits are wanted of, how many such steps], ...]};
and to {"products": true} it answers with `Products`.
"""

import sys
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import msgspec
import torch

from stepladder import LLM
from stepladder.kernels.cpu.native import Projection
from stepladder.launch.bench.engine.bounds import ROWS, Products
from stepladder.launch.bench.engine.peer_process import serve
from stepladder.parallel.model import Transformer
from stepladder.workers.core import Request, SamplingParams, StepPlan
from stepladder.workers.sampler import Drawn


def start(model: str, dtype: str, threads: int) -> Callable[[Any], Any]:
    engine = LLM(model, "cpu", dtype=dtype, threads=threads, kv_tokens=32768).engine
    steps, submit = Counter[tuple[int, int]](), engine.executor.submit

    def counted(plan: StepPlan) -> Drawn:
        steps[len(plan.tokens), len(plan.rows)] += 1
        return submit(plan)

    engine.executor.submit = counted  # type: ignore[method-assign]

    def answer(message: Any) -> dict[str, Any]:
        if "products" in message:
            return msgspec.to_builtins(products(engine.executor.model))
        steps.clear()
        began = perf_counter()
        for number, (prompt, length) in enumerate(zip(message["prompts"], message["lengths"], strict=True)):
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            engine.add(Request(id=str(number), prompt=tuple(prompt), params=params))
        while engine.has_work:
            engine.step()
        seconds = perf_counter() - began
        return {"seconds": seconds, "steps": [[*rows, count] for rows, count in steps.items()]}

    return answer


@torch.inference_mode()
def products(model: Transformer) -> Products | None:
    """What the products of the model's own weights take, one after the other; None without native kernels."""
    if not model.native:
        return None
    modules: Any = model.modules_of_blocks
    wide, stream = torch.float32, model.spec.dtype  # what lies between the products of a module is fp32
    blocks = [each for m in modules for each in ((m.project_in, stream), (m.project_out, wide))]
    head: Any = [(model.head.project_out, stream)]
    return Products(
        [_seconds(blocks, rows) for rows in ROWS],
        [_seconds(head, rows) for rows in ROWS],
        sum(product.panels.nbytes for product, _ in blocks),
        sum(product.panels.nbytes for product, _ in head),
    )


def _seconds(products: list[tuple[Projection, torch.dtype]], rows: int) -> float:
    """The best of three, with inputs of these dtypes."""
    inputs = [torch.randn(rows, product.panels.shape[1]).to(dtype) for product, dtype in products]
    best = float("inf")
    for _ in range(3):
        began = perf_counter()
        for x, (product, _) in zip(inputs, products, strict=True):
            product(x)
        best = min(best, perf_counter() - began)
    return best


if __name__ == "__main__":
    serve(lambda: start(sys.argv[1], sys.argv[2], int(sys.argv[3])))
