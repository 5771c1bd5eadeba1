"""Steps and requests to run with and without graphs and lookahead, on any device."""

import random
from collections.abc import Callable
from pathlib import Path

import torch

from stepladder.parallel.mesh import Mesh
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Request, SamplingParams, StepPlan
from stepladder.workers.engine import Engine
from stepladder.workers.graphs import Capture
from stepladder.workers.scheduler import SchedulerConfig

BLOCKS, SIZE, VOCAB = 60, 4, 101
WIRINGS = ("standard", "ladder", "parallel", "ladder-parallel")


def plans(seed: int, steps: int = 10) -> list[StepPlan]:
    """A prefill of six sequences, then decode steps of any of them; contexts of 1 to 8 blocks, in no order."""
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 20) for _ in range(6)]
    order = draw.sample(range(BLOCKS), BLOCKS)
    tables = [[order.pop() for _ in range(8)] for _ in lengths]

    def plan(members: list[int], starts: list[int], counts: list[int], rows: list[int]) -> StepPlan:
        held = [-(-(s + n) // SIZE) for s, n in zip(starts, counts, strict=True)]
        tokens = [draw.randrange(VOCAB) for _ in range(sum(counts))]
        return StepPlan(tokens, starts, counts, [tables[i][:n] for i, n in zip(members, held, strict=True)], rows)

    made = [plan([*range(6)], [0] * 6, list(lengths), [])]
    for _ in range(steps):
        members = draw.sample(range(6), draw.randrange(1, 7))
        made.append(plan(members, [lengths[i] for i in members], [1] * len(members), [*range(len(members))]))
        for index in members:
            lengths[index] += 1
    return made


def compare(spec: ModelSpec, path: Path, capture: Capture, bound: float) -> Callable[[Mesh], int]:
    """On each rank: the same steps with and without a recording; returns how many shapes were recorded."""

    def rank_main(mesh: Mesh) -> int:
        plain = whole_executor(spec, str(path), mesh, BLOCKS, SIZE, kernels="torch")
        replaying = whole_executor(spec, str(path), mesh, BLOCKS, SIZE, capture=capture)
        for plan in plans(3):
            (_, want), (_, got) = plain._forward(plan), replaying._forward(plan)
            assert (want is None) == (got is None) == (mesh.shard.rank > 0 or not plan.rows)
            if want is not None and got is not None:
                assert (got - want).abs().max() <= bound * want.abs().max()
        for mine, theirs in ((plain.cache.keys, replaying.cache.keys), (plain.cache.values, replaying.cache.values)):
            spare = theirs[:, BLOCKS:]
            assert spare.shape[1] == 1 and spare.any(), "the padding belongs to the spare block"
            theirs = theirs[:, :BLOCKS]
            assert (theirs - mine).abs().max() <= bound * mine.abs().max()
            assert torch.equal(theirs.eq(0), mine.eq(0)), "a slot was written that belongs to no token"
        assert replaying.forward.graphs is not None
        return len(replaying.forward.graphs._recorded)

    return rank_main


FEATURES = (
    SamplingParams(max_tokens=12, temperature=0.0),
    SamplingParams(max_tokens=9, temperature=0.9, top_p=0.8, seed=5),
    SamplingParams(max_tokens=14, temperature=0.7, top_k=20, min_p=0.01, seed=-3, logprobs=2),
    SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, logprobs=0),
    SamplingParams(max_tokens=11, logit_bias={7: 3.0}, frequency_penalty=0.5, prompt_logprobs=3, seed=9),
    SamplingParams(max_tokens=13, min_tokens=4, stop_token_ids=tuple(range(0, VOCAB, 9)), seed=2),
)


def requests(prompts: list[list[int]]) -> list[Request]:
    return [
        Request(id=str(i), prompt=tuple(prompt), params=FEATURES[i % len(FEATURES)])
        for i, prompt in enumerate(prompts * 2)
    ]


def serve(engine: Engine, made: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.id: [] for request in made}
    for request in made:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.id].extend(output.tokens)
    engine.heartbeat()
    return tokens


CONFIG = SchedulerConfig(max_sequences=5, max_step_tokens=16, max_model_len=64, num_blocks=30, block_size=SIZE)
