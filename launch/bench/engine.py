"""suite=engine: tokens per second on the CPU, beside transformers and beside the bare matrix products.

Both sides run the same random weights (88 million parameters, the bundled tokenizer), the same prompts and the same
number of tokens, in turns. The bound is what the engine's own steps would take if they were matrix products alone.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from stepladder import LLM
from stepladder.kernels.linear import can_pack, linear, pack
from stepladder.launch.bench.overhead import cpu_seconds_of_serving
from stepladder.launch.report import Goal, Report, Row, at_least, at_most
from stepladder.launch.typed_config import check_counts
from stepladder.launch.where import BUNDLED
from stepladder.workers.core import Request, SamplingParams, StepPlan
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.sampler import Drawn

SHAPES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "bos_token_id": None,
}
GOALS = {"one": 1.1, "equal": 1.2, "ragged": 1.5}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # sizes at which the bare products are timed; others are rounded up


@dataclass(frozen=True, kw_only=True)
class EngineBench:
    """repeats: of each measurement, in turns with the rival. new_tokens, prompt_tokens: of each sequence, where equal.
    sequences: of a batch. threads: None takes all cores. serving: also measure what serving costs besides the engine,
    with requests of serving_tokens tokens.
    """

    name: str
    run_dir: str
    repeats: int = 3
    new_tokens: int = 48
    prompt_tokens: int = 64
    sequences: int = 16
    threads: int | None = None
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    serving: bool = True
    serving_tokens: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "repeats", "new_tokens", "prompt_tokens", "sequences", "serving_tokens")


@dataclass(frozen=True)
class Work:
    """prompts: token ids; lengths: tokens to generate, per prompt."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def run(config: EngineBench) -> Report:
    """Raises ValueError where transformers is not installed."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    rows: list[Row] = []
    summary: dict[str, Goal] = {}
    with TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for dtype in config.dtypes:
            for case, work in cases(config).items():
                row, ratio = compare(f"{case} {dtype}", model, dtype, work, config.repeats)
                rows.append(row)
                summary[f"{row.case} against transformers"] = at_least(ratio, GOALS[case])
            rows.append(price_of_invariance(model, dtype, cases(config)["one"], config.repeats))
        if config.serving:
            costs = cpu_seconds_of_serving(model, config.sequences, config.serving_tokens)
            case, rival = "serving float32", costs.engine * 1e3
            rows.append(Row(case, "CPU per token, Ray + ZeroMQ + gateway", costs.serving * 1e3, "ms", rival=rival))
            rows.append(Row(case, "CPU per token, the idle Ray below", costs.idle * 1e3, "ms", rival=rival))
            summary["CPU of serving over the engine's"] = at_most(costs.serving / costs.engine, 0.1)
            summary["the same with the idle Ray"] = at_most((costs.serving + costs.idle) / costs.engine, 0.1)
    return Report("engine", rows, summary)


def cases(config: EngineBench) -> dict[str, Work]:
    """One request; a batch of equals; a batch whose prompts and outputs differ up to fourfold."""
    draw, n = random.Random(0), config.sequences

    def work(prompt_lengths: list[int], lengths: list[int]) -> Work:
        return Work([[draw.randrange(SHAPES["vocab_size"]) for _ in range(k)] for k in prompt_lengths], lengths)

    spread = [0.25 + 1.5 * index / max(1, n - 1) for index in range(n)]  # mean 1
    ragged = [max(1, int(config.new_tokens * s)) for s in spread]
    draw.shuffle(ragged)
    return {
        "one": work([config.prompt_tokens], [config.new_tokens]),
        "equal": work([config.prompt_tokens] * n, [config.new_tokens] * n),
        "ragged": work([max(1, int(config.prompt_tokens * s)) for s in spread], ragged),
    }


def compare(case: str, model: Path, dtype: str, work: Work, repeats: int) -> tuple[Row, float]:
    """Ours and transformers' tokens per second, in turns; medians, and the median of the paired ratios."""
    llm, theirs = LLM(str(model), "cpu", dtype=dtype), _transformers(model, dtype)
    pairs = [(ours_per_second(llm.engine, work), theirs(work)) for _ in range(repeats + 1)][1:]  # the first warms up
    llm.engine.executor = recording = Recording(llm.engine.executor)
    ours_per_second(llm.engine, work)
    ours, rival = (median(side) for side in zip(*pairs, strict=True))
    row = Row(case, "tokens/s", ours, "1/s", bound=work.tokens / bare_seconds(recording), rival=rival)
    return row, median(a / b for a, b in pairs)


def price_of_invariance(model: Path, dtype: str, work: Work, repeats: int) -> Row:
    """One request with engine.batch_invariant, beside the same without."""
    sides = [LLM(str(model), "cpu", dtype=dtype, batch_invariant=on) for on in (True, False)]
    pairs = [[ours_per_second(llm.engine, work) for llm in sides] for _ in range(repeats + 1)][1:]
    invariant, plain = (median(side) for side in zip(*pairs, strict=True))
    return Row(f"one {dtype}, batch_invariant", "tokens/s", invariant, "1/s", rival=plain)


def ours_per_second(engine: Engine, work: Work) -> float:
    engine.scheduler.blocks.forget()  # a prompt that was seen before would not be computed again
    for index, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        engine.add(Request(id=str(index), prompt=tuple(prompt), params=params))
    began = perf_counter()
    while engine.has_work:
        engine.step()
    return work.tokens / (perf_counter() - began)


class Recording(Executor):
    """Another executor's steps, counted by their number of rows."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner.forward, inner.mesh)
        self.steps = Counter[int]()

    def submit(self, plan: StepPlan) -> Drawn:
        self.steps[len(plan.tokens)] += 1
        return super().submit(plan)


@torch.inference_mode()
def bare_seconds(recorded: Recording) -> float:
    """What the steps' matrix products take alone: every layer's own weights, in the fastest form there is."""
    spec, steps = recorded.model.spec, recorded.steps
    shapes = _shapes() * spec.num_layers + [(spec.vocab_size, spec.hidden_size)]
    weights = [torch.randn(shape).to(spec.dtype) for shape in shapes]
    weights = [pack(weight) if can_pack(weight) else weight for weight in weights]
    inputs = [torch.randn(ROWS[-1], shape[1]).to(spec.dtype) for shape in shapes]

    def step(rows: int) -> float:
        began = perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            linear(x[:rows], weight)
        return perf_counter() - began

    sizes = {rows: next(size for size in ROWS if size >= rows) for rows in steps}
    seconds = {size: min(step(size) for _ in range(5)) for size in set(sizes.values())}
    return sum(count * seconds[sizes[rows]] for rows, count in steps.items())


def write_model(folder: Path) -> Path:
    """Random weights with the bundled tokenizer."""
    llama = _import_transformers()
    torch.manual_seed(0)
    llama.LlamaForCausalLM(llama.LlamaConfig(**SHAPES)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


def _transformers(model: Path, dtype: str) -> Callable[[Work], float]:
    """Static-batch `generate` until the longest is done; only the tokens that were asked for count."""
    llama = _import_transformers().LlamaForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def per_second(work: Work) -> float:
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in work.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.prompts])
        began = perf_counter()
        llama.generate(ids, attention_mask=mask, max_new_tokens=max(work.lengths), do_sample=False, pad_token_id=0)
        return work.tokens / (perf_counter() - began)

    return per_second


def _shapes() -> list[tuple[int, int]]:
    """[out, in] of a layer's products: query-key-value, output, gate-up, down."""
    hidden, inner = SHAPES["hidden_size"], SHAPES["intermediate_size"]
    return [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("suite=engine needs transformers; pip install 'stepladder[test,bench]'") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


SUITE = EngineBench, run
