"""The whole engine (scheduler, paged cache, sampler, ranks) against `generate` of `transformers`."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.scheduler import SchedulerConfig
from tests.llama import oracle_greedy, read_llama, write_llama
from tests.ranks import run_ranks

COUNT = 64


def serve(engine: Engine, requests: list[Request], apart: int = 2) -> dict[str, list[int]]:
    """Run until all is done; a request arrives every `apart` steps."""
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    arrivals, step = list(requests), 0
    while arrivals or engine.has_work:
        if arrivals and step % apart == 0:
            engine.add(arrivals.pop(0))
        for output in engine.step():
            tokens[output.id].extend(output.tokens)
        step += 1
    engine.scheduler.check_integrity()
    return tokens


def lead_or_follow(mesh: Mesh, path: Path, config: SchedulerConfig, requests: list[Request]) -> dict[str, list[int]]:
    executor = whole_executor(ModelSpec.load(path), str(path), mesh, config.num_blocks, config.block_size)
    if mesh.shard.rank:
        executor.follow()
        return {}
    tokens = serve(Engine(config, executor), requests)
    executor.stop()
    return tokens


@pytest.fixture(scope="module")
def greedy(untied: Path, tied: Path, prompts: list[list[int]]) -> dict[Path, list[list[int]]]:
    """What transformers says, per checkpoint and prompt."""
    return {path: [oracle_greedy(read_llama(path), p, COUNT) for p in prompts] for path in (untied, tied)}


@pytest.mark.parametrize(
    ("tp", "checkpoint", "lookahead"),
    [
        (1, "untied", 0),
        (1, "tied", 0),
        (1, "untied", 1),
        (2, "untied", 0),
        (2, "tied", 0),
        (2, "untied", 1),
        (4, "untied", 0),
    ],
)
def test_greedy_tokens_equal_generate(
    tp: int,
    checkpoint: str,
    lookahead: int,
    prompts: list[list[int]],
    greedy: dict[Path, list[list[int]]],
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(checkpoint)
    config = SchedulerConfig(
        max_sequences=6, max_step_tokens=12, max_model_len=128, num_blocks=90, block_size=4, lookahead=lookahead
    )
    params = SamplingParams(max_tokens=COUNT, temperature=0.0)
    some = prompts[: 7 if tp < 4 else 5]  # four ranks on two cores: a step takes 50 ms
    requests = [Request(id=str(i), prompt=tuple(p), params=params) for i, p in enumerate(some)]
    got = run_ranks(tp, lambda mesh: lead_or_follow(mesh, path, config, requests))[0]
    assert [got[r.id] for r in requests] == greedy[path][: len(some)]
    assert all(len(set(tokens)) > 8 for tokens in greedy[path]), "the oracle's text is degenerate and proves little"


def test_sampled_tokens_do_not_depend_on_batch_chunks_ranks_preemption_or_replay(
    untied: Path, prompts: list[list[int]]
) -> None:
    """A request's tokens are a function of prompt, parameters and seed alone; so is a continuation of them."""
    requests = [
        Request(id=str(i), prompt=tuple(p), params=SamplingParams(max_tokens=20, temperature=0.9, top_p=0.8, seed=-i))
        for i, p in enumerate(prompts)
    ]
    wide = SchedulerConfig(max_sequences=1, max_step_tokens=64, max_model_len=64, num_blocks=16, block_size=4)
    narrow = SchedulerConfig(max_sequences=4, max_step_tokens=5, max_model_len=64, num_blocks=20, block_size=4)
    spec = ModelSpec.load(untied)
    alone = serve(Engine(wide, whole_executor(spec, str(untied), SingleRank(), 16, 4)), requests)
    crowded = Engine(narrow, whole_executor(spec, str(untied), SingleRank(), 20, 4))
    assert serve(crowded, requests, apart=1) == alone
    assert crowded.stats.preemptions > 0
    ahead = Engine(replace(narrow, lookahead=1), whole_executor(spec, str(untied), SingleRank(), 20, 4))
    assert serve(ahead, requests, apart=1) == alone
    assert ahead.stats.preemptions > 0
    replays = [Request(id=r.id, prompt=r.prompt, params=r.params, output=tuple(alone[r.id][:7])) for r in requests]
    for config in (narrow, replace(narrow, lookahead=1)):
        again = run_ranks(2, lambda mesh, config=config: lead_or_follow(mesh, untied, config, replays))[0]
        assert {key: alone[key][:7] + tokens for key, tokens in again.items()} == alone


def test_stats_count_what_happened(untied: Path) -> None:
    config = SchedulerConfig(max_sequences=2, max_step_tokens=8, max_model_len=64, num_blocks=16, block_size=4)
    engine = Engine(config, whole_executor(ModelSpec.load(untied), str(untied), SingleRank(), 16, 4))
    for index in range(3):
        params = SamplingParams(max_tokens=4, temperature=0.0)
        engine.add(Request(id=str(index), prompt=(1, 2, 3), params=params))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (2, 1)
    assert engine.stats.kv_usage == pytest.approx(2 / 16)
    while engine.has_work:
        engine.step()
    engine.heartbeat()
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.running, stats.kv_usage) == (9, 12, 0, 0.0)
    assert (stats.max_model_len, stats.step_tokens, sum(stats.step_sizes)) == (64, 3 * (3 + 3), stats.steps)
    assert stats.step_sizes[:2] == [3, 5], "the third one decodes alone"


def test_abort_frees_everything(untied: Path) -> None:
    config = SchedulerConfig(max_sequences=1, max_step_tokens=4, max_model_len=64, num_blocks=16, block_size=4)
    engine = Engine(config, whole_executor(ModelSpec.load(untied), str(untied), SingleRank(), 16, 4))
    for name in ("running", "waiting"):
        engine.add(Request(id=name, prompt=(1,) * 9, params=SamplingParams()))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (1, 1) and engine.stats.kv_usage > 0
    assert engine.abort("running") and engine.abort("waiting") and not engine.abort("running")
    assert (engine.stats.running, engine.stats.waiting, engine.stats.kv_usage) == (0, 0, 0.0)
    assert not engine.has_work and engine.scheduler.blocks.num_free == 16


def test_what_is_under_way_when_all_is_aborted_is_run_out(untied: Path) -> None:
    config = SchedulerConfig(
        max_sequences=2, max_step_tokens=4, max_model_len=64, num_blocks=16, block_size=4, lookahead=1
    )
    engine = Engine(config, whole_executor(ModelSpec.load(untied), str(untied), SingleRank(), 16, 4))
    engine.add(Request(id="a", prompt=(1,) * 3, params=SamplingParams()))
    assert [len(o.tokens) for o in engine.step()] == [1] and engine.abort("a")
    assert engine.scheduler.blocks.num_free == 16 and not engine.scheduler.has_work
    assert engine.has_work, "the step behind is still under way"
    assert engine.step() == [] and not engine.has_work
    engine.heartbeat()
    engine.add(Request(id="a", prompt=(1,) * 3, params=SamplingParams(max_tokens=2)))
    assert [[o.finish_reason for o in engine.step()] for _ in range(2)] == [[None], ["length"]]
    assert not engine.has_work, "nothing was queued for a sequence that was bound to end"


def test_the_padding_of_the_vocabulary_is_never_drawn(tmp_path: Path) -> None:
    """Five tokens on four ranks are eight rows, three of them padding; a head of zeros makes all equally likely."""
    path = write_llama(tmp_path, vocab_size=5)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = SchedulerConfig(max_sequences=4, max_step_tokens=8, max_model_len=64, num_blocks=16, block_size=4)
    requests = [Request(id=str(i), prompt=(i,), params=SamplingParams(max_tokens=8, seed=i)) for i in range(4)]
    alone, four = (run_ranks(tp, lambda mesh: lead_or_follow(mesh, path, config, requests))[0] for tp in (1, 4))
    assert four == alone and {token for tokens in alone.values() for token in tokens} == set(range(5))
