"""The modules of a block. Each owns its norm and returns this rank's *partial* sum; the block reduces.

Letters: T tokens, h hidden, H this rank's query heads, K its KV heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.norm import rms_norm
from kernels.rope import rotate
from parallel.context import Context
from parallel.shards import Shard, Sharded, columns, rows, whole
from parallel.spec import ModelSpec


class RMSNorm(nn.Module):
    def __init__(self, spec: ModelSpec, name: str) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.weight = Sharded.of(whole(name, spec.hidden_size), dtype=spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the step's contexts; query, key and value come from one matrix product."""

    def __init__(self, spec: ModelSpec, layer: int, shard: Shard) -> None:
        super().__init__()
        prefix, d, h = f"model.layers.{layer}", spec.head_dim, spec.hidden_size
        heads = shard.split(spec.num_heads, "num_attention_heads")
        kv_heads = kv_heads_of(spec, shard)
        self.layer, self.head_dim, self.num_heads, self.num_kv_heads = layer, d, len(heads), len(kv_heads)
        q_rows, kv_rows = (range(part.start * d, part.stop * d) for part in (heads, kv_heads))
        q_shape, kv_shape = (spec.num_heads * d, h), (spec.num_kv_heads * d, h)
        self.norm = RMSNorm(spec, f"{prefix}.input_layernorm.weight")
        self.qkv = Sharded.of(
            rows(f"{prefix}.self_attn.q_proj.weight", q_shape, q_rows),
            rows(f"{prefix}.self_attn.k_proj.weight", kv_shape, kv_rows),
            rows(f"{prefix}.self_attn.v_proj.weight", kv_shape, kv_rows),
            dtype=spec.dtype,
        )
        self.out = Sharded.of(
            columns(f"{prefix}.self_attn.o_proj.weight", (h, spec.num_heads * d), q_rows), dtype=spec.dtype
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[T, h] -> partial [T, h]."""
        qkv = F.linear(self.norm(x), self.qkv).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        return F.linear(context.attend(self.layer, q, k, v).flatten(1), self.out)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2002.05202): down(silu(gate x) * up x); gate and up in one matrix product."""

    def __init__(self, spec: ModelSpec, layer: int, shard: Shard) -> None:
        super().__init__()
        prefix, h, inner = f"model.layers.{layer}", spec.hidden_size, spec.intermediate_size
        part = shard.split(inner, "intermediate_size")
        self.norm = RMSNorm(spec, f"{prefix}.post_attention_layernorm.weight")
        self.gate_up = Sharded.of(
            rows(f"{prefix}.mlp.gate_proj.weight", (inner, h), part),
            rows(f"{prefix}.mlp.up_proj.weight", (inner, h), part),
            dtype=spec.dtype,
        )
        self.down = Sharded.of(columns(f"{prefix}.mlp.down_proj.weight", (h, inner), part), dtype=spec.dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[T, h] -> partial [T, h]."""
        gate, up = F.linear(self.norm(x), self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class VocabParallel(nn.Module):
    """A vocabulary matrix split by rows over the ranks, used as embedding, as head, or (tied) as both.

    The vocabulary is padded with zero rows to a multiple of the group's size.
    """

    def __init__(self, spec: ModelSpec, name: str, shard: Shard) -> None:
        super().__init__()
        height = -(-spec.vocab_size // shard.size)
        self.first = shard.rank * height
        part = range(min(self.first, spec.vocab_size), min(self.first + height, spec.vocab_size))
        shape = (spec.vocab_size, spec.hidden_size)
        self.weight = Sharded.of(rows(name, shape, part), dtype=spec.dtype, rows=height)
        self.whole = shard.size == 1

    def embed(self, tokens: Tensor) -> Tensor:
        """[T] -> partial [T, h]: zeros for the tokens that other ranks hold."""
        if self.whole:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        mine = (local >= 0) & (local < len(self.weight))
        return F.embedding(local.where(mine, 0), self.weight) * mine[:, None]

    def logits(self, x: Tensor) -> Tensor:
        """[R, h] -> this rank's columns of the logits, [R, padded vocabulary / ranks]."""
        return F.linear(x, self.weight)


def kv_heads_of(spec: ModelSpec, shard: Shard) -> range:
    """The KV heads a rank holds: its equal part, or one head shared by several ranks where there are fewer heads."""
    if spec.num_kv_heads >= shard.size:
        return shard.split(spec.num_kv_heads, "num_key_value_heads")
    if shard.size % spec.num_kv_heads:
        raise ValueError(
            f"num_key_value_heads is {spec.num_kv_heads}, which {shard.size} ranks cannot replicate evenly; "
            f"change layout.tp"
        )
    head = shard.rank * spec.num_kv_heads // shard.size
    return range(head, head + 1)


def init_weights(module: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill parameters for training from scratch: normal(0, 0.02), output projections scaled by 1/sqrt(2 layers)
    (GPT-2, Radford et al. 2019 §2.3), norms one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        std = 0.02 / (2 * spec.num_layers) ** 0.5 if name.endswith((".out", ".down")) else 0.02
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
