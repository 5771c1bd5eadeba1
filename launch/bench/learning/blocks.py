"""The blocks of a run, one after the other."""

import requests
from tqdm import tqdm

from stepladder.launch.bench.learning.figures import Block
from stepladder.launch.bench.learning.options import LearningBench
from stepladder.launch.bench.learning.traffic import Traffic
from stepladder.launch.bench.learning.trainer import Done, Trainer


def measured(config: LearningBench, url: str, trainer: Trainer) -> tuple[list[Block], Done]:
    """All blocks, and what the trainer has done in all.

    Raises:
        RuntimeError: a block has served nothing.
    """
    model = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
    traffic, before, blocks = Traffic(url, model, config), trainer.done(), list[Block]()
    traffic.serve(config.warm)
    for number in tqdm(range(config.blocks), unit="block"):
        allowed = config.allowed(number)
        trainer.allow(allowed)
        traffic.serve(config.guard)
        begin = trainer.done()
        load = traffic.serve(config.seconds - config.guard)
        if not any(timing.success for timing in load.timings):
            why = load.timings[0].error if load.timings else "it was too short for a burst after a lull"
            raise RuntimeError(f"block {number} has served no request: {why}")
        blocks.append(Block(allowed, load, trainer.done().since(begin)))
    return blocks, trainer.done().since(before)
