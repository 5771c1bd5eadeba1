"""suite=fp8: what FP8 rows from attention to FFN cost in quality: the same held-out text through both wires.

The model is taken apart both times, an A and an F rank as threads of one process with an edge between them, so that the
two runs differ in their wire alone. Any wiring is measured, though a deployment offers FP8 at lag 0 only.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stepladder.cluster.config import ModelConfig
from stepladder.launch.recipes.convert import some
from stepladder.launch.recipes.corpus import standard_library
from stepladder.launch.recipes.training import Words, size
from stepladder.launch.report import Goal, Report, Row
from stepladder.launch.typed_config import check_counts
from stepladder.parallel.afd.edges import GlooEdge
from stepladder.parallel.afd.pool_link import Layout, Link
from stepladder.parallel.afd.sides import AttentionSide, FeedForwardSide
from stepladder.parallel.afd.wire import WIRES, Wire
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.source.resolve import resolve
from stepladder.workers.training.evaluate import batches

DEADLINE = timedelta(seconds=600)  # for one module of one batch


@dataclass(frozen=True, kw_only=True)
class Fp8Bench:
    """held_out_bytes: measure on about so much text; null for all. threads: of torch."""

    name: str
    run_dir: str
    model: ModelConfig
    held_out_bytes: int | None
    threads: int

    def __post_init__(self) -> None:
        check_counts(self, "held_out_bytes", "threads")


class Apart:
    """A model as one A and one F rank of one process; A -> F goes over `wire`."""

    def __init__(self, spec: ModelSpec, directory: Path, wire: Wire) -> None:
        self.spec, self._attention, self._ffn = spec, AttentionSide(spec), FeedForwardSide(spec)
        for side in (self._attention, self._ffn):
            load_weights(side, directory)
        self._a, self._f = _edge(wire)
        self._numbers = count()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Final hidden states of sequences from their start: [batch, length] int64 -> [batch, length, hidden]."""
        layout = Layout(0, next(self._numbers), ((tokens.numel(),),))
        with ThreadPoolExecutor(1) as other:
            ffn = other.submit(self._run_ffn, layout)
            link = Link([self._a], layout, self.spec)
            try:
                (hidden,) = self._attention([tokens.reshape(-1)], [WholeSequences(*tokens.shape)], link)
            except BaseException:
                self._a.abort()
                ffn.result()  # if that is where it went wrong, its error says more
                raise
            ffn.result()
        return hidden.view(*tokens.shape, -1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocabulary] fp32."""
        return self._attention.logits(hidden).float()

    @torch.inference_mode()
    def _run_ffn(self, layout: Layout) -> None:
        try:
            self._ffn([self._f], layout)
        except BaseException:
            self._f.abort()  # or the other half would wait until the deadline
            raise


def _edge(wire: Wire) -> tuple[GlooEdge, GlooEdge]:
    """The ends of A and of F, which wait for each other."""
    store, name = dist.HashStore(), f"a0-f0 {wire.name}"
    with ThreadPoolExecutor(1) as other:
        f = other.submit(GlooEdge, store, name, end=1, deadline=DEADLINE, receive_as=wire)
        return GlooEdge(store, name, end=0, deadline=DEADLINE, send_as=wire), f.result()


@dataclass
class Difference:
    """Sums over tokens. plain, fp8: nats that they cost; divergence: KL of FP8's distribution from plain's, in nats;
    agreed: how often both have the same likeliest token; error, largest: of all logits."""

    tokens: int = 0
    plain: float = 0.0
    fp8: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    error: float = 0.0
    largest: float = 0.0

    def add(self, plain: Tensor, fp8: Tensor, targets: Tensor) -> None:
        """Logits [R, vocabulary] of either run, and the tokens [R] that follow."""
        sure, unsure = plain.log_softmax(-1), fp8.log_softmax(-1)
        self.tokens += len(targets)
        self.plain += F.nll_loss(sure, targets, reduction="sum").item()
        self.fp8 += F.nll_loss(unsure, targets, reduction="sum").item()
        self.divergence += F.kl_div(unsure, sure, reduction="sum", log_target=True).item()
        self.agreed += int((plain.argmax(-1) == fp8.argmax(-1)).sum())
        self.error = max(self.error, (plain - fp8).abs().max().item())
        self.largest = max(self.largest, plain.abs().max().item())


def run(config: Fp8Bench) -> Report:
    torch.set_num_threads(config.threads)
    directory = Path(resolve(config.model.path, cache=config.model.cache, fetching=True))
    spec = ModelSpec.load(directory)
    words, text = Words.of_model(directory, spec.eos_ids), some(standard_library().held_out, config.held_out_bytes)
    found = compare(spec, directory, words.alone(text))
    return report(config.model.name, spec, found, size(text))


def compare(spec: ModelSpec, directory: Path, documents: Iterable[Sequence[int]]) -> Difference:
    """Both wires on windows of the model's longest context; a document is its token ids with an end on either side."""
    plain, fp8 = (Apart(spec, directory, WIRES[name]) for name in ("plain", "fp8"))
    found = Difference()
    for group in tqdm(list(batches(documents, spec.max_position)), unit="batch"):
        tokens = torch.tensor([window.tokens for window in group])
        states = zip(plain(tokens[:, :-1]), fp8(tokens[:, :-1]), tokens[:, 1:], group, strict=True)
        for one, other, targets, window in states:
            start = window.counted
            found.add(plain.logits(one[start:]), fp8.logits(other[start:]), targets[start:])
    return found


def report(model: str, spec: ModelSpec, found: Difference, num_bytes: int) -> Report:
    plain, fp8 = (nats / math.log(2) / num_bytes for nats in (found.plain, found.fp8))
    change = (fp8 / plain - 1) * 100
    sizes = [WIRES[name].size(1, spec.hidden_size, spec.dtype) for name in ("plain", "fp8")]
    case = f"{model} FP8"
    rows = [
        Row(f"{model} plain", "held-out cost", plain, "bits per byte"),
        Row(case, "held-out cost", fp8, "bits per byte", rival=plain),
        Row(case, "change of the cost", change, "%"),
        Row(case, "largest logit error / largest logit", found.error / found.largest * 100, "%"),
        Row(case, "mean KL divergence from plain", found.divergence / found.tokens, "nats per token"),
        Row(case, "same likeliest token", found.agreed / found.tokens * 100, "%"),
        Row(case, "row of a message", sizes[1], "bytes", rival=sizes[0]),
    ]
    lag = int(any(spec.is_ladder(layer) for layer in range(spec.num_layers)))
    emulated = f"A and F (wiring {spec.residual}, lag {lag}) are threads of one process; rows are really quantised"
    summary = {"bits per byte change, %": Goal(change, "no bar", math.isfinite(change))}
    return Report("fp8", rows, summary, emulated)


SUITE = Fp8Bench, run
