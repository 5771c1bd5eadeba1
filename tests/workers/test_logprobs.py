"""Log-probabilities of a real engine against log_softmax of `transformers`, undisturbed, preempted and replayed."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Output, Request, SamplingParams, Sequence, TokenLogprob
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.logprobs import judge, tell
from stepladder.workers.scheduler import SchedulerConfig
from stepladder.workers.server.messages import EngineStats, Update, decode_update, encode
from tests.llama import oracle_logits, read_llama
from tests.ranks import run_ranks

WIDE = SchedulerConfig(max_sequences=1, max_step_tokens=64, max_model_len=64, num_blocks=16, block_size=4)
NARROW = SchedulerConfig(max_sequences=4, max_step_tokens=5, max_model_len=64, num_blocks=20, block_size=4)
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "min_p": 0.02, "top_k": 30}


@dataclass
class Received:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompts: list[list[TokenLogprob]] = field(default_factory=list)


def engine(path: Path, config: SchedulerConfig, mesh: Mesh | None = None) -> Engine:
    spec = ModelSpec.load(path)
    return Engine(config, whole_executor(spec, str(path), mesh or SingleRank(), config.num_blocks, config.block_size))


def serve(engine: Engine, requests: list[Request]) -> dict[str, Received]:
    got: dict[str, Received] = {r.id: Received() for r in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            mine = got[output.id]
            mine.tokens += output.tokens
            assert len(output.logprobs or ()) in (0, len(output.tokens))
            mine.logprobs += output.logprobs or []
            if output.prompt_logprobs is not None:
                mine.prompts.append(output.prompt_logprobs)
    return got


def requests_of(prompts: list[list[int]]) -> list[Request]:
    """Some ask for logprobs, some for those of the prompt, some for both, some for nothing."""
    made = []
    for i, prompt in enumerate(prompts):
        wanted = {"logprobs": (None, 0, 3)[i % 3], "prompt_logprobs": (2, None, 0, 4)[i % 4]}
        params = SamplingParams(max_tokens=20, temperature=0.9, seed=i, **PENALISED, **wanted)  # type: ignore[arg-type]
        made.append(Request(id=str(i), prompt=tuple(prompt), params=params))
    return made


def check(found: list[TokenLogprob], oracle: torch.Tensor, tokens: list[int], top: int) -> None:
    """oracle: log-softmax [len(tokens), vocab]."""
    assert len(found) == len(tokens)
    for one, row, token in zip(found, oracle, tokens, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert one.rank == int((row > row[token]).sum()) + 1
        best = row.topk(top)
        assert one.top_tokens == best.indices.tolist()
        assert one.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def undisturbed(untied: Path, prompts: list[list[int]]) -> dict[str, Received]:
    return serve(engine(untied, WIDE), requests_of(prompts))


def test_they_are_the_models_own(untied: Path, prompts: list[list[int]], undisturbed: dict[str, Received]) -> None:
    model = read_llama(untied)
    for request in requests_of(prompts):
        got, params, prompt = undisturbed[request.id], request.params, list(request.prompt)
        oracle = oracle_logits(model, prompt + got.tokens).log_softmax(-1)
        if params.logprobs is None:
            assert got.logprobs == []
        else:
            check(got.logprobs, oracle[len(prompt) - 1 : -1], got.tokens, params.logprobs)
        if params.prompt_logprobs is None:
            assert got.prompts == []
        else:
            [found] = got.prompts
            check(found, oracle[: len(prompt) - 1], prompt[1:], params.prompt_logprobs)


def same(got: Received, want: Received) -> None:
    """Equal but for the rounding of other chunks and batches."""
    assert got.tokens == want.tokens and len(got.prompts) == len(want.prompts)
    for a, b in zip([got.logprobs, *got.prompts], [want.logprobs, *want.prompts], strict=True):
        assert [(x.rank, x.top_tokens) for x in a] == [(x.rank, x.top_tokens) for x in b]
        for x, y in zip(a, b, strict=True):
            assert [x.logprob, *x.top_logprobs] == pytest.approx([y.logprob, *y.top_logprobs], abs=1e-4)


@pytest.mark.parametrize(("tp", "lookahead"), [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_chunks_batches_and_preemption_change_nothing(
    tp: int, lookahead: int, untied: Path, prompts: list[list[int]], undisturbed: dict[str, Received]
) -> None:
    """Also that prompt logprobs come exactly once, and that penalties see the same history."""

    def rank_main(mesh: Mesh) -> tuple[dict[str, Received], int]:
        crowded = engine(untied, replace(NARROW, lookahead=lookahead), mesh)
        assert isinstance(crowded.executor, Executor)
        if mesh.shard.rank:
            crowded.executor.follow()
            return {}, 0
        got = serve(crowded, requests_of(prompts))
        crowded.executor.stop()
        return got, crowded.stats.preemptions

    got, preemptions = run_ranks(tp, rank_main)[0]
    assert preemptions > 0
    for name, want in undisturbed.items():
        same(got[name], want)


def test_a_preempted_prefill_is_not_scored_twice(untied: Path) -> None:
    """Preempted half-way through: every position of the prompt is scored once, and all come with the first token."""
    config = SchedulerConfig(max_sequences=2, max_step_tokens=4, max_model_len=32, num_blocks=8, block_size=4)
    served = engine(untied, config)
    params = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1)
    served.add(Request(id="a", prompt=tuple(range(20)), params=params))
    for _ in range(3):
        served.step()
    scheduler, scored, counts = served.scheduler, list[int](), list[int | None]()
    scheduler._preempt()
    while served.has_work:
        plan = scheduler.schedule()
        scored += [target for score in plan.scores for target in score.targets]
        outputs = scheduler.commit(served.executor.submit(plan).result())
        counts += [None if o.prompt_logprobs is None else len(o.prompt_logprobs) for o in outputs]
    assert scored == list(range(13, 20)), "12 positions were scored before"
    assert counts == [19, None, None, None]


def test_a_replay_continues_alike_and_returns_no_prompt_logprobs(
    untied: Path, prompts: list[list[int]], undisturbed: dict[str, Received]
) -> None:
    for request in requests_of(prompts):
        before = undisturbed[request.id]
        assert not Sequence(replace(request, output=(1,))).unscored, "they were returned with the first token"
        [again] = serve(engine(untied, NARROW), [replace(request, output=tuple(before.tokens[:7]))]).values()
        want = Received(before.tokens[7:], before.logprobs[7:])
        same(again, want)


def test_a_step_with_scores_only_and_a_prompt_of_one_token(untied: Path) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    [one] = serve(engine(untied, NARROW), [Request(id="1", prompt=(3,), params=params)]).values()
    assert one.prompts == [[]]


def test_slices_and_infinities() -> None:
    logits = torch.randn(600, 11).double()
    logits[5, 3] = float("-inf")
    found = tell(judge(logits, torch.arange(600), torch.full((600,), 3), top=2), [2] * 600)
    want = logits.log_softmax(-1)
    assert [f.logprob for f in found] == pytest.approx(want[:, 3].tolist(), abs=1e-5)
    assert found[5].rank == 11 and all(len(f.top_tokens) == 2 for f in found)


def test_they_survive_the_wire() -> None:
    one = TokenLogprob(-0.5, 2, [7, 3], [-0.25, -0.5])
    output = Output("a", [3], None, [one], [one, TokenLogprob(float("-inf"), 9, [], [])])
    update = Update(1, 1, [output, Output("b", [1], "stop")], [], EngineStats(), [])
    assert decode_update(encode(update)).outputs == update.outputs


def test_a_prompt_that_is_known_is_scored_all_the_same(untied: Path, prompts: list[list[int]]) -> None:
    """Its keys and values may be there already, but not its logits."""
    served = engine(untied, WIDE)
    for wanted in (None, 1, 1):
        params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=wanted)
        [got] = serve(served, [Request(id="again", prompt=tuple(prompts[3]), params=params)]).values()
        assert [len(found) for found in got.prompts] == ([] if wanted is None else [len(prompts[3]) - 1])
