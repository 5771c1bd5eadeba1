"""What one rank of tests/workers/speculation/learning/test_learner_ranks.py does; `torchrun` starts it."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from stepladder.workers.speculation.learning.learner import Learner
from stepladder.workers.training import sharded
from stepladder.workers.training.ranks import Ranks, training_ranks
from tests.workers.speculation.learning.texts import CONFIG, captured, target_of

STAGES, MICRO_BATCHES = (1, 2, 3), 12


def learn(model: Path, out: Path, ranks: Ranks) -> None:
    """As many places in all whatever the number of ranks; then a candidate, and on with it as the live head."""
    target, sharded.KEPT_WHOLE = target_of(model), 0  # stage 3 cuts up even so small a network
    for stage in STAGES:
        config = replace(CONFIG, zero_stage=stage, batch=CONFIG.batch // ranks.size)
        learner, losses, candidate = Learner(target, model, ranks, config), [], None
        if ranks.rank == 0:
            learner.add(captured(target, range(40), way=1))
        for number in range(2 * MICRO_BATCHES):
            losses.append(learner.micro_batch())
            if number + 1 == MICRO_BATCHES:
                first = learner.weights()
                learner.consider()
                if ranks.rank == 0:
                    candidate = learner.candidate()
                    assert candidate.head.net.state_dict().keys() == first.keys()
                    assert all(torch.equal(first[n], w) for n, w in candidate.head.net.state_dict().items())
                learner.begin_with(candidate.head if candidate else None)
                assert all(torch.equal(first[n], w) for n, w in learner.weights().items())
        result = {"first": first, "weights": learner.weights(), "losses": losses}
        result |= {"tokens": learner.teacher.tokens, "scores": candidate.scores if candidate else None}
        state = sum(t.numel() for s in learner.engine.optimizer.state.values() for t in s.values() if t.dim())
        torch.save(result | {"state": state}, out / f"{stage}-{ranks.rank}-of-{ranks.size}.pt")
        learner.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with training_ranks() as ranks:
        learn(Path(sys.argv[1]), Path(sys.argv[2]), ranks)
