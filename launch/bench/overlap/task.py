"""What the suite asks of its rank processes, and what they answer: plain data that goes through pipes as JSON."""

from dataclasses import dataclass, field

import torch

from stepladder.launch.bench.rig.spans import Span
from stepladder.parallel.spec import ModelSpec

WIRINGS = ("standard", "ladder", "parallel", "ladder-parallel")
BOUND = "no communication"  # the standard wiring with every partial sum taken for the sum: right in time only
VARIANTS = (*WIRINGS, BOUND)


@dataclass(frozen=True)
class Shapes:
    """A model of random weights with SwiGLU. kv_heads: None takes as many as heads. balance: FFNs make up for heads
    that the ranks cannot share evenly, in every wiring."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    dtype: str
    kv_heads: int | None = None
    balance: bool = False

    def spec(self) -> ModelSpec:
        return ModelSpec(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads or self.heads,
            head_dim=self.hidden // self.heads,
            max_position=1 << 16,
            tie_embeddings=True,
            dtype=getattr(torch, self.dtype),
        )


@dataclass(frozen=True)
class Case:
    """One step: `batch` sequences that bring `length` tokens each behind `context` cached ones."""

    batch: int
    length: int
    context: int

    @property
    def name(self) -> str:
        return f"decode {self.batch}" if self.length == 1 else f"prefill {self.batch} x {self.length}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Task:
    """rounds: each runs every variant once, in an order of its own. late: seconds added to every reduce, emulated."""

    case: Case
    rounds: int
    late: float


@dataclass(frozen=True)
class Answer:
    """One rank's measurements, in seconds; lists by round.

    Attributes:
        steps: by variant. reduce: a lone all-reduce of the case's size; reduce_cpu: what of a core it takes; pair: two
            that were issued together.
        blocks: by module, the compute of one of its blocks, without communication.
        hidden: by wiring, the share of the reduces' time that the rank's counters call hidden. CPU ranks only.
        spans: by wiring, some steps as they went, for the same share computed from a trace. CPU ranks only.
    """

    steps: dict[str, list[float]]
    reduce: list[float]
    reduce_cpu: list[float]
    pair: list[float]
    blocks: dict[str, float]
    hidden: dict[str, float] = field(default_factory=dict)
    spans: dict[str, list[list[Span]]] = field(default_factory=dict)
