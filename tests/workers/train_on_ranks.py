"""What one rank of tests/workers/test_trainer_ranks.py does; `torchrun` starts it."""

import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero.muon import original_muon

from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.workers.training.ranks import Ranks, training_ranks
from stepladder.workers.training.trainer import Trainer
from tests.workers.test_trainer import ADAMW, CONFIG, SPEC, STREAM

CONFIGS = {"muon": CONFIG, "adamw": ADAMW}
STEPS = 14  # over the checkpoint at 10


def train(directory: Path, ranks: Ranks) -> None:
    """Train SPEC with both optimisers, stop, resume; weights and sizes of this rank go to `directory`.

    Newton-Schulz runs in fp32: in bf16 it turns the last bit of a gradient into the third digit of the update.
    """
    original_muon.ns_compute_dtype = lambda method: torch.float32
    for name, config in CONFIGS.items():
        for until in (STEPS - 2, STEPS):
            model = Transformer(SPEC)
            init_weights(model, SPEC, config.seed)
            trainer = Trainer(model, STREAM, config, directory / name, ranks)
            assert trainer.step == (0 if until < STEPS else 10)
            rows: list[dict[str, float]] = []
            for _ in trainer.run(rows.append, until):
                pass
            states = trainer.optimizer.state.values()
            state = sum(t.numel() for s in states for t in s.values() if torch.is_tensor(t) and t.dim())
            trainer.close()
        result = {"weights": model.state_dict(), "state": state, "loss": rows[-1]["train/loss"]}
        torch.save(result, directory / f"{name}-{ranks.rank}-of-{ranks.size}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with training_ranks() as ranks:
        train(Path(sys.argv[1]), ranks)
