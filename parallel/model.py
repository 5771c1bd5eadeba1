"""The transformer of one rank: embedding, blocks on the residual stream, final norm, head."""

import torch
from torch import Tensor, nn

from stepladder.kernels.rope import rope_frequencies, rope_table
from stepladder.parallel.context import Context
from stepladder.parallel.modules import Attention, FeedForward, Norm, VocabParallel
from stepladder.parallel.residual import Block, Done, Reduce, ResidualStream, run_blocks, together
from stepladder.parallel.shards import Shard, whole
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import wiring

MODULES = {"attention": Attention, "ffn": FeedForward}


class Transformer(nn.Module):
    """One rank's shard of the model. It knows its shard and how to start a reduce, nothing else of the cluster.

    Args:
        spec: the whole model's shapes and wiring.
        shard: this rank's place.
        reduce: starts the all-reduce of a partial sum; the default is right for one rank.
    """

    frequencies: Tensor

    def __init__(self, spec: ModelSpec, shard: Shard = Shard(), reduce: Reduce = Done) -> None:  # noqa: B008
        super().__init__()
        self.spec, self.shard, self.reduce = spec, shard, reduce
        self.embedding = VocabParallel(spec, "model.embed_tokens.weight", shard)
        self.modules_of_blocks = nn.ModuleList()
        self.blocks: list[Block] = []
        for plan in wiring(spec):
            modules = [MODULES[name](spec, plan.layer, shard) for name in plan.modules]
            self.modules_of_blocks.extend(modules)
            self.blocks.append(Block(plan.lag, modules))
        self.norm = Norm(spec, whole("model.norm.weight", spec.hidden_size))
        self.head = self.embedding if spec.tie_embeddings else VocabParallel(spec, "lm_head.weight", shard)
        device = torch.get_default_device()
        frequencies = rope_frequencies(spec.head_dim, spec.rope_theta, device, spec.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return next(m.num_kv_heads for m in self.modules_of_blocks if isinstance(m, Attention))

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """Final hidden states, normalised: [T] int64 -> [T, hidden]."""
        x = self.reduce(self.embedding.embed(tokens)).wait()
        interleaved = self.spec.rope_interleaved
        context.cos, context.sin = rope_table(context.positions, self.frequencies, x.dtype, interleaved)
        return self.norm(run_blocks(self.blocks, [ResidualStream(x)], [context], together(self.reduce))[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the logits: [R, hidden] -> [R, padded vocabulary / ranks]."""
        return self.head.logits(hidden)
