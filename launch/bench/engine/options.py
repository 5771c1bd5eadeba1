"""The options of suite=engine."""

from dataclasses import dataclass, field
from sys import executable

from stepladder.cluster.config import ModelConfig
from stepladder.launch.bench.engine.work import TITLES
from stepladder.launch.typed_config import check_counts

PARTS = ("cases", "products", "attention", "neighbours", "serving")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Peers:
    """transformers: from this environment. vllm: the Python of an environment that has it. llama_cpp: folder of a
    build with GGUF files; docs/operating.md says how to have both."""

    transformers: bool = True
    vllm: str | None = None
    llama_cpp: str | None = None

    def pythons(self) -> dict[str, str]:
        """Those that run as processes of a Python, each with its own."""
        return ({"transformers": executable} if self.transformers else {}) | ({"vllm": self.vllm} if self.vllm else {})


@dataclass(frozen=True, kw_only=True)
class EngineBench:
    """Options.

    Attributes:
        parts: what is measured.
        cases: of those in work.py. scale: their lengths are multiplied by it, also those of the part `attention`.
        repeats: of everything, in turns with what it is compared with.
        threads: of every engine.
        shapes, rows: of the part `products`: [outputs, inputs] of weights, and numbers of rows.
        sequences, serving_tokens: of the part `serving`: concurrent requests, and tokens of each.
    """

    name: str
    run_dir: str
    model: ModelConfig
    parts: list[str]
    cases: list[str]
    shapes: list[tuple[int, int]]
    rows: list[int]
    peers: Peers = field(default_factory=Peers)
    dtypes: list[str] = field(default_factory=lambda: [*DTYPES])
    repeats: int = 3
    scale: float = 1.0
    threads: int = 2
    sequences: int = 16
    serving_tokens: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "repeats", "threads", "sequences", "serving_tokens")
        for name, known in (("parts", PARTS), ("cases", [*TITLES]), ("dtypes", DTYPES)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name} has {unknown[0]!r}; it takes {', '.join(known)}")
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}; it must be above 0")
