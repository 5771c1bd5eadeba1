"""What a drafter shares with its target: embedding and head, of which it drafts over the frequent tokens only."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.modules import VocabParallel
from stepladder.parallel.shards import ALONE
from stepladder.parallel.spec import ModelSpec

__all__ = ["TargetVocabulary", "most_frequent"]


class TargetVocabulary(nn.Module):
    """Embedding and head of a checkpoint, whole, whatever the target's ranks hold of them.

    Args:
        spec, directory: the checkpoint.

    Raises:
        ValueError: it is unusable.
    """

    def __init__(self, spec: ModelSpec, directory: str | Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        with torch.device(device):
            self.embedding = VocabParallel(spec, "embedding", ALONE)
            self.head = self.embedding if spec.tie_embeddings else VocabParallel(spec, "head", ALONE)
        load_weights(self, directory)
        self.requires_grad_(False)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [N] -> fp32 [N, hidden]."""
        return self.embedding.embed(tokens).float()

    def rows(self, tokens: Tensor) -> Tensor:
        """The head's rows of these tokens, so that logits are their products with a hidden state: fp32 [N, hidden]."""
        return self.head.weight[tokens].float() * self.head.scale


def most_frequent(texts: Iterable[list[int]], size: int, vocab_size: int) -> Tensor:
    """The tokens that a drafter proposes: those that occur most often, as FR-Spec chooses them (Zhao et al.
    2502.14856); the rest are those that a tokenizer has learnt first. int64 [size], ascending."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(torch.tensor(text, dtype=torch.int64), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values
