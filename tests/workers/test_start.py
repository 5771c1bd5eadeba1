"""What the engine says with a sequence's first token: how long it waited, its prefill's time, what was cached."""

from pathlib import Path
from time import monotonic

import pytest

from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Output, Request, SamplingParams, Start
from stepladder.workers.engine import Engine
from stepladder.workers.scheduler import SchedulerConfig
from tests.llama import write_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("start"))


def engine(model: Path, num_blocks: int = 64, **limits: int) -> Engine:
    fields = {"max_sequences": 2, "max_model_len": 128, "block_size": 4, **limits}
    config = SchedulerConfig(num_blocks=num_blocks, **fields)
    return Engine(
        config, whole_executor(ModelSpec.load(model), str(model), SingleRank(), num_blocks, config.block_size)
    )


def request(name: str, max_tokens: int = 8, length: int = 20, output: tuple[int, ...] = ()) -> Request:
    prompt = tuple((ord(name[0]) + i) % 101 for i in range(length))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(id=name, prompt=prompt, params=params, output=output)


def run(engine: Engine, *requests: Request) -> tuple[dict[str, list[Output]], dict[str, list[float]]]:
    """The outputs of each request, and when they came."""
    outputs: dict[str, list[Output]] = {r.id: [] for r in requests}
    times: dict[str, list[float]] = {r.id: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for output in engine.step():
            outputs[output.id].append(output)
            times[output.id].append(monotonic())
    return outputs, times


def started(outputs: list[Output]) -> Start:
    """It is there with the first output, and only there."""
    (start,) = [output.start for output in outputs if output.start]
    assert outputs[0].start is start
    return start


@pytest.mark.parametrize("lookahead", [0, 1])
def test_queue_and_prefill_are_measured(model: Path, lookahead: int) -> None:
    began, served = monotonic(), engine(model, max_sequences=1, max_step_tokens=7, lookahead=lookahead)
    outputs, times = run(served, request("a", 30), request("b"))
    a, b = started(outputs["a"]), started(outputs["b"])
    assert 0 <= a.queue_seconds < b.queue_seconds
    assert times["a"][-3] - times["a"][0] < b.queue_seconds, "it had to wait for the other's end"
    for name, start in (("a", a), ("b", b)):
        assert start.prefill_seconds > 0, "three steps of at most 7 tokens"
        assert start.queue_seconds + start.prefill_seconds <= times[name][0] - began
    assert a.cached_tokens == b.cached_tokens == 0


def test_cached_tokens_come_with_it(model: Path) -> None:
    warm = engine(model)
    run(warm, request("a"))
    assert started(run(warm, request("again"))[0]["again"]).cached_tokens == 16, "four whole blocks"


def test_a_replay_says_it_only_if_it_brings_the_first_token(model: Path) -> None:
    tokens = [token for output in run(engine(model), request("a"))[0]["a"] for token in output.tokens]
    behind = run(engine(model), request("a", output=tuple(tokens[:3])))[0]["a"]
    assert [token for output in behind for token in output.tokens] == tokens[3:]
    assert all(output.start is None for output in behind)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_preempted_sequence_says_it_once(model: Path, lookahead: int) -> None:
    tight = engine(model, num_blocks=14, max_sequences=4, max_model_len=48, lookahead=lookahead)
    outputs, _ = run(tight, *(request(name, 24, 8) for name in "abcd"))
    assert tight.stats.preemptions > 0
    for found in outputs.values():
        assert len(found) == 24 and started(found).prefill_seconds > 0


def test_a_preempted_prefill_counts_as_prefill(model: Path) -> None:
    """Two older sequences grow while a long prompt is prefilled two tokens at a time, until the cache is full."""
    tight = engine(model, num_blocks=20, max_sequences=4, max_step_tokens=4, max_model_len=72)
    for old in "ab":
        tight.add(request(old, 40, 4))
    while not all(s.num_output for s in (*tight.scheduler.running, *tight.scheduler.waiting)):
        tight.step()
    added = monotonic()
    tight.add(request("c", 8, 40))
    sequence = tight.find("c")
    assert sequence is not None
    while sequence not in tight.scheduler.running:
        tight.step()
    waited = monotonic() - added
    while not tight.stats.preemptions:
        assert not sequence.num_output
        tight.step()
    outputs = [output for _ in range(200) if tight.has_work for output in tight.step() if output.id == "c"]
    start = started(outputs)
    assert len(outputs) == 8 and start.queue_seconds <= waited < start.prefill_seconds


def test_equal_starts_may_differ_in_their_times() -> None:
    assert Start(3, 0.1, 0.2) == Start(3, 0.3, 0.4) != Start(4, 0.1, 0.2)
