"""The models of the real part: checkpoints that are there, or random weights written for the run."""

import json
from dataclasses import dataclass
from pathlib import Path

from stepladder.launch.bench.rig import hosts as rig
from stepladder.parallel.checkpoint import save_weights
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.source.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of random weights: SwiGLU, grouped-query attention, embedding and head tied."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads, max_position=1 << 16, tie_embeddings=True, residual="ladder",
        )  # fmt: skip


class Wire(rig.Wire):
    """late_ms: by which a message comes late at least."""

    @property
    def name(self) -> str:
        if self.late_ms:
            return f"+ {self.late_ms:g} ms one way (emulated)"
        return "unshaped link" if self.rate is None else f"link shaped to {self.rate:g} Mbit/s"


@dataclass(frozen=True, kw_only=True)
class Model:
    """path: a checkpoint's directory; null: random weights of these shapes. batches, wires: that it is tried with."""

    name: str
    batches: list[int]
    wires: list[Wire]
    path: str | None = None
    shapes: Shapes | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.shapes is None):
            raise ValueError(f"model {self.name} must have either a path or shapes")
        if not self.batches or not self.wires or min(self.batches) < 2:
            raise ValueError(f"model {self.name} needs batches of at least 2, and wires")

    @property
    def spec(self) -> ModelSpec:
        """Raises ValueError where there is no such checkpoint."""
        if self.path is not None:
            return ModelSpec.load(resolve(self.path))
        assert self.shapes
        return self.shapes.spec

    def directory(self, folder: Path) -> Path:
        """The checkpoint; random weights are written to `folder`."""
        if self.path is not None:
            return Path(resolve(self.path))
        spec = self.spec
        model = Transformer(spec)
        init_weights(model, spec, seed=0)
        save_weights(model, folder, spec.dtype)
        (folder / "config.json").write_text(json.dumps(spec.to_config()))
        return folder
