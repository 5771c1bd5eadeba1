"""How evenly a router spreads tokens over experts, and these over ranks."""

from dataclasses import dataclass, field

import torch

from stepladder.parallel.model import Transformer
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.parallel.shards import Shard
from stepladder.workers.figures import LISTED, counter, gauge


@dataclass
class ExpertLoad:
    """Of a rank that routes, over all layers; every rank of a group routes alike.

    Attributes:
        expert_tokens: that each expert computed, since start; a token counts once for each of its experts.
        expert_imbalance: those of the busiest expert over the mean; 0 without experts or tokens.
        expert_rank_imbalance: the same of ranks; 1 where each has a part of every expert.
        expert_tokens_dropped: there is no capacity that could be full.
    """

    expert_tokens: list[int] = field(default_factory=list, metadata=LISTED)
    expert_imbalance: float = gauge(
        "expert_imbalance", "Tokens of the busiest expert over the mean.", default=0.0, across="mean"
    )
    expert_rank_imbalance: float = gauge(
        "expert_rank_imbalance",
        "Tokens of the rank with the busiest experts over the mean.",
        default=0.0,
        across="mean",
    )
    expert_tokens_dropped: int = counter("expert_tokens_dropped", "Tokens that an expert had no room for: none, ever.")

    def take_load(self, model: Transformer) -> None:
        """As it is now."""
        layers = [module.load for module in model.modules() if isinstance(module, MixtureOfExperts)]
        if not layers:
            return
        self.expert_tokens = [int(count) for count in torch.stack(layers).sum(0).tolist()]
        place, count = model.placement, len(self.expert_tokens)
        shares = [Shard(rank, place.held.size).split(count, "experts") for rank in range(place.held.size)]
        self.expert_imbalance = _imbalance(self.expert_tokens)
        self.expert_rank_imbalance = _imbalance([sum(self.expert_tokens[part.start : part.stop]) for part in shares])


def _imbalance(loads: list[int]) -> float:
    return max(loads) * len(loads) / total if (total := sum(loads)) else 0.0
