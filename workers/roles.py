"""What a group of ranks can be for, and the kind of rank that it then has."""

from stepladder.workers.afd.ranks import AttentionRank, FeedForwardRank
from stepladder.workers.engine_rank import EngineRank
from stepladder.workers.rank import ATTENTION, FFN, TRAINER, WHOLE, Rank, RankConfig
from stepladder.workers.trainer_rank import TrainerRank

ROLES: dict[str, type[Rank]] = {WHOLE: EngineRank, ATTENTION: AttentionRank, FFN: FeedForwardRank}
ROLES[TRAINER] = TrainerRank


def rank_of(config: RankConfig) -> Rank:
    """The rank of this role, not loaded yet."""
    return ROLES[config.role](config)
