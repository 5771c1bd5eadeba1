"""The modules of a block. Each owns its norm and returns this rank's *partial* sum; the block reduces.

`PRODUCTS` names the methods that are a module's large products; CPU ranks put kernels of their own in their place
(native.py).

Letters: T tokens, h hidden, H this rank's query heads, K its KV heads, D head dim.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.kernels.cpu.native import Rotation
from stepladder.kernels.norm import layer_norm, rms_norm
from stepladder.kernels.rope import rotate
from stepladder.parallel.context import Context
from stepladder.parallel.heads import heads_of
from stepladder.parallel.shards import Piece, Shard, Sharded, columns, rows, whole
from stepladder.parallel.spec import ModelSpec

NORMS = {"rms": rms_norm, "layer": layer_norm}


class Product(NamedTuple):
    """A method that is (swiglu)(norm(x) W^T + b). weight: the name of W; b is called like it, with `_bias` behind.
    norm: the name of the norm, if there is one. wide: what comes out is for this module alone, not for the stream."""

    weight: str
    norm: str | None = None
    gated: bool = False
    wide: bool = False


class Norm(nn.Module):
    """The model's kind of norm over the last dimension, with the weight that `piece` describes."""

    def __init__(self, spec: ModelSpec, piece: Piece) -> None:
        super().__init__()
        self.eps, self.kernel = spec.norm_eps, NORMS[spec.norm]
        self.weight = Sharded.of(piece, dtype=spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the step's contexts; query, key and value come from one matrix product."""

    PRODUCTS: ClassVar = {"project_in": Product("qkv", "norm"), "project_out": Product("out")}
    rotate_and_store: Rotation  # where the kernels are native

    def __init__(self, spec: ModelSpec, layer: int, shard: Shard) -> None:
        super().__init__()
        d, h = spec.head_dim, spec.hidden_size
        heads, kv_heads = heads_of(spec, shard)
        self.layer, self.window, self.interleaved = layer, spec.window(layer), spec.rope_interleaved
        self.head_dim, self.num_heads, self.num_kv_heads = d, len(heads), len(kv_heads)
        q_rows, kv_rows = (range(part.start * d, part.stop * d) for part in (heads, kv_heads))
        cuts = {"q": (spec.num_heads * d, q_rows)} | dict.fromkeys("kv", (spec.num_kv_heads * d, kv_rows))
        name = partial(_name, spec, "attention", layer)
        self.norm = Norm(spec, whole(name("norm"), h))
        self._take_queries(spec, name, cuts)
        self.qkv_bias = self.out_bias = None
        if spec.qkv_bias:
            self.qkv_bias = Sharded.of(
                *(rows(name(p, "bias"), (size,), part) for p, (size, part) in cuts.items()), dtype=spec.dtype
            )
        self.q_norm = _head_norm(spec, name("q_norm"), spec.num_heads, heads)
        self.k_norm = _head_norm(spec, name("k_norm"), spec.num_kv_heads, kv_heads)
        self.out = Sharded.of(columns(name("out"), (h, spec.num_heads * d), q_rows), dtype=spec.dtype)
        if spec.out_bias:
            self.out_bias = bias_of_sum(name("out", "bias"), spec, shard)

    def _take_queries(self, spec: ModelSpec, name: Callable[..., str], cuts: Mapping[str, tuple[int, range]]) -> None:
        """The matrix that queries, keys and values come from. cuts: of each, the rows of the whole and this rank's."""
        parts = (rows(name(p), (size, spec.hidden_size), part) for p, (size, part) in cuts.items())
        self.qkv = Sharded.of(*parts, dtype=spec.dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[T, h] -> partial [T, h]."""
        return self.project_out(context.mix(self, self.project_in(x)))

    def project_in(self, x: Tensor) -> Tensor:
        """[T, h] -> queries, keys and values side by side, [T, (H + 2 K) D]."""
        return F.linear(self.norm(x), self.qkv, self.qkv_bias)

    def project_out(self, mixed: Tensor) -> Tensor:
        """What attention gave, [T, H D] -> partial [T, h]."""
        return F.linear(mixed, self.out, self.out_bias)

    def rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (H + 2 K) D] -> queries [T, H, D] and keys [T, K, D], turned by their positions, and values [T, K, D]."""
        qkv = qkv.view(len(qkv), -1, self.head_dim)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is None or self.k_norm is None:
            qk = qkv[:, : self.num_heads + self.num_kv_heads]
        else:
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin, self.interleaved).split([self.num_heads, self.num_kv_heads], dim=1)
        return q, k, v


class FactoredAttention(Attention):
    """Multi-matrix factorization attention (Hu et al. 2412.19255, in the form of Step-3, 2507.19427): queries come in
    two steps with a norm between them, keys and values are of one head.

    The first step, which all heads share, is on every rank; the second is cut by heads. Letter r: its inner size.
    """

    PRODUCTS: ClassVar = {
        "project_down": Product("qkv", "norm"),
        "project_up": Product("queries", "query_norm"),
        "project_out": Product("out"),
    }

    def _take_queries(self, spec: ModelSpec, name: Callable[..., str], cuts: Mapping[str, tuple[int, range]]) -> None:
        self.query_rank, (heads, mine) = spec.query_rank, cuts["q"]
        super()._take_queries(spec, name, {**cuts, "q": (self.query_rank, range(self.query_rank))})
        self.query_norm = Norm(spec, whole(name("query_norm"), self.query_rank))
        self.queries = Sharded.of(rows(name("queries"), (heads, self.query_rank), mine), dtype=spec.dtype)

    def project_in(self, x: Tensor) -> Tensor:
        down = self.project_down(x)
        return torch.cat((self.project_up(down[:, : self.query_rank].contiguous()), down[:, self.query_rank :]), dim=1)

    def project_down(self, x: Tensor) -> Tensor:
        """[T, h] -> what queries come from, keys and values side by side, [T, r + 2 K D]."""
        return F.linear(self.norm(x), self.qkv, self.qkv_bias)

    def project_up(self, inner: Tensor) -> Tensor:
        """[T, r] -> queries [T, H D]."""
        return F.linear(self.query_norm(inner), self.queries)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2002.05202): down(silu(gate x) * up x); gate and up in one matrix product."""

    PRODUCTS: ClassVar = {"project_in": Product("gate_up", "norm", gated=True), "project_out": Product("down")}

    def __init__(self, spec: ModelSpec, layer: int, shard: Shard) -> None:
        super().__init__()
        h, inner = spec.hidden_size, spec.intermediate_size
        name, part = partial(_name, spec, "ffn", layer), shard.split(inner, "intermediate_size")
        self.norm = Norm(spec, whole(name("norm"), h))
        self.gate_up = Sharded.of(*(rows(name(p), (inner, h), part) for p in ("gate", "up")), dtype=spec.dtype)
        self.down = Sharded.of(columns(name("down"), (h, inner), part), dtype=spec.dtype)
        self.gate_up_bias = self.down_bias = None
        if spec.mlp_bias:
            self.gate_up_bias = Sharded.of(
                *(rows(name(p, "bias"), (inner,), part) for p in ("gate", "up")), dtype=spec.dtype
            )
            self.down_bias = bias_of_sum(name("down", "bias"), spec, shard)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[T, h] -> partial [T, h]."""
        return self.project_out(self.project_in(x))

    def project_in(self, x: Tensor) -> Tensor:
        """[T, h] -> what the gates let through, [T, inner]."""
        gate, up = F.linear(self.norm(x), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return F.silu(gate) * up

    def project_out(self, inner: Tensor) -> Tensor:
        """[T, inner] -> partial [T, h]."""
        return F.linear(inner, self.down, self.down_bias)


class VocabParallel(nn.Module):
    """A vocabulary matrix split by rows over the ranks, used as embedding, as head, or (tied) as both.

    The vocabulary is padded with zero rows to a multiple of the group's size.
    """

    def __init__(self, spec: ModelSpec, what: str, shard: Shard) -> None:
        super().__init__()
        height = -(-spec.vocab_size // shard.size)
        self.first = shard.rank * height
        part = range(min(self.first, spec.vocab_size), min(self.first + height, spec.vocab_size))
        shape = (spec.vocab_size, spec.hidden_size)
        self.weight = Sharded.of(rows(spec.tensor(what), shape, part), dtype=spec.dtype, rows=height)
        self.whole, self.scale = shard.size == 1, spec.logit_scale

    def embed(self, tokens: Tensor) -> Tensor:
        """[T] -> partial [T, h]: zeros for the tokens that other ranks hold."""
        if self.whole:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        mine = (local >= 0) & (local < len(self.weight))
        return F.embedding(local.where(mine, 0), self.weight) * mine[:, None]

    def logits(self, x: Tensor) -> Tensor:
        """[R, h] -> this rank's columns of the logits, [R, padded vocabulary / ranks]."""
        logits = self.project_out(x)
        return logits if self.scale == 1 else logits * self.scale

    def project_out(self, x: Tensor) -> Tensor:
        """The product of the head: [R, h] -> [R, rows]."""
        return F.linear(x, self.weight)


def _name(spec: ModelSpec, seat: str, layer: int, what: str, part: str = "weight") -> str:
    return spec.tensor(f"{seat}.{what}", layer, part)


def bias_of_sum(name: str, spec: ModelSpec, shard: Shard) -> Sharded:
    """The bias of a row-parallel layer [h]: rank 0 adds it to its partial sum, the other ranks add zeros."""
    size = spec.hidden_size
    return Sharded.of(rows(name, (size,), range(0 if shard.rank else size)), dtype=spec.dtype, rows=size)


def _head_norm(spec: ModelSpec, name: str, total: int, heads: range) -> nn.Module | None:
    """The norm of this rank's query or key heads [T, heads, D] before they are rotated."""
    if spec.qk_norm == "none":
        return None
    if spec.qk_norm == "shared":
        return Norm(spec, whole(name, spec.head_dim))
    return Norm(spec, rows(name, (total, spec.head_dim), heads))


def init_weights(module: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill parameters for training from scratch: normal(0, 0.02), output projections scaled by 1/sqrt(2 layers)
    (GPT-2, Radford et al. 2019 §2.3), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 or "norm" in name:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.02 / (2 * spec.num_layers) ** 0.5 if name.endswith((".out", ".down")) else 0.02
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
