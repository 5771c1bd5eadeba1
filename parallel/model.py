"""The transformer of one rank: embedding, blocks on the residual stream, final norm, head; or one pool's part of it."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from stepladder.kernels.rope import rope_frequencies
from stepladder.parallel.context import Context, KVCache
from stepladder.parallel.layers import POOLS, build_blocks
from stepladder.parallel.modules import Attention, Norm, VocabParallel
from stepladder.parallel.residual import Contribute, Done, Reduce, ResidualStream, run_blocks, together
from stepladder.parallel.shards import ALONE, Placement, Shard, whole
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import ATTENTION


class Transformer(nn.Module):
    """One rank's shard of the model. It knows its place and how to start a reduce, nothing else of the cluster.

    Attributes:
        native: it has been laid out for the native kernels of a CPU rank (native.py).
        directory: of the checkpoint that it was filled from.

    Args:
        spec: the whole model's shapes and wiring.
        placement: this rank's place in the groups that share modules, or its only Shard.
        reduce: starts the all-reduce of a partial sum; the default is right for one rank.
        pools: whose modules it holds. Embedding, final norm and head are with attention.
    """

    directory: str | None
    frequencies: Tensor
    embedding: VocabParallel
    head: VocabParallel
    norm: Norm

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement | Shard = ALONE,
        reduce: Reduce = Done,
        pools: Collection[str] = POOLS,
    ) -> None:
        super().__init__()
        self.spec, self.placement, self.reduce = spec, Placement.of(placement), reduce
        self.native, self.directory = False, None
        if ATTENTION in pools:
            self.embedding = VocabParallel(spec, "embedding", self.shard)
        self.blocks = build_blocks(spec, self.placement, pools)
        self.modules_of_blocks = nn.ModuleList(m for block in self.blocks for m in block.modules)  # type: ignore[misc]
        if ATTENTION in pools:
            self.norm = Norm(spec, whole(spec.tensor("norm"), spec.hidden_size))
            self.head = self.embedding if spec.tie_embeddings else VocabParallel(spec, "head", self.shard)
            device = torch.get_default_device()
            frequencies = rope_frequencies(spec.head_dim, spec.rope_theta, device, spec.rope_scaling)
            self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def shard(self) -> Shard:
        """This rank's place where attention, embedding and head are shared."""
        return self.placement.attention

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return next(m.num_kv_heads for m in self.modules_of_blocks if isinstance(m, Attention))

    def cache(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty one, as this model's kernels want it."""
        return KVCache(self.spec, self.num_kv_heads, num_blocks, block_size, self.frequencies.device, self.native)

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """Final hidden states, normalised: [T] int64 -> [T, hidden]."""
        stream = ResidualStream(self.embed(tokens, context))
        return self.finish([stream], [context], together(self.reduce))[0]

    def embed(self, tokens: Tensor, context: Context) -> Tensor:
        """x_0, [T] -> [T, hidden]; sets the context's rotary tables."""
        x = self.reduce(self.embedding.embed(tokens)).wait()
        context.take_angles(self.spec, self.frequencies, x.dtype)
        return x

    def finish(
        self, streams: Sequence[ResidualStream], contexts: Sequence[Context], contribute: Contribute
    ) -> list[Tensor]:
        """All blocks and the final norm, for one or several micro-batches: [T, hidden] of each."""
        return [self.norm(x) for x in run_blocks(self.blocks, streams, contexts, contribute)]

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the logits: [R, hidden] -> [R, padded vocabulary / ranks]."""
        return self.head.logits(hidden)
