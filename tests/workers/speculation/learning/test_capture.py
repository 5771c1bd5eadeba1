"""What an engine captures: the tokens that it wrote, with the hidden states of a forward pass."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepladder import LLM
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.pool_forward import attention_executor
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Request, SamplingParams, StepPlan
from stepladder.workers.engine import Engine
from stepladder.workers.executor import Executor
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafters.suffix import Suffix
from stepladder.workers.speculation.learning import capture as module
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.learning.lessons import Captured, number_of
from stepladder.workers.speculation.learning.ring import Ring
from stepladder.workers.speculation.speculator import Speculator
from tests.ranks import run_ranks
from tests.workers.speculation.learning.captures import Noting, by_request, check, states_of
from tests.workers.speculation.serving import LIMITS, Texts, requests, serve
from tests.workers.speculation.test_coupled import Fickle
from tests.workers.test_afd import membership, pool_of

CLOSE = 2**-7  # of bf16


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"lookahead": 1}, {"num_blocks": 18, "prefix_caching": False}, {"num_blocks": 18, "lookahead": 1}],
    ids=["plain", "ahead", "preempted", "both"],
)
@pytest.mark.parametrize("drafting", [False, True])
def test_pieces_together_are_the_outputs(
    executor: Executor, directory: Path, plain: Texts, drafting: bool, options: dict[str, Any], piece: int
) -> None:
    captured = list[Captured]()
    capture, drafter = Capture(captured.append, piece), Noting(plain) if drafting else None
    texts, engine = serve(executor, requests(), drafter, 4, capture, **options)
    assert texts == plain and bool(engine.stats.preemptions) == ("num_blocks" in options)
    check(captured, requests(), plain)
    assert max(len(one.lesson.tokens) for one in captured) <= max(piece, 5 if drafting else 1)
    found = by_request(captured)
    for request in requests()[:3]:
        states = states_of(directory, request, plain[request.id][0])
        assert torch.allclose(found[number_of(request)].states.float(), states, rtol=CLOSE, atol=CLOSE)
    for request in requests():
        rejected = drafter.rejected[request.id] if drafter else []
        assert found[number_of(request)].wrong.nonzero().flatten().tolist() == rejected
    assert not drafter or sum(map(len, drafter.rejected.values())) > 20


def test_of_the_bundled_model() -> None:
    """A ladder model with a real drafter, against a prefill of what it wrote."""
    llm = LLM("launch/demo_model", "cpu")
    engine, executor = llm.engine, llm.engine.executor
    engine.speculate(Speculator(Suffix(threshold=0.1), SpeculateConfig(kind="suffix", k=3), engine.stats))
    captured = list[Captured]()
    engine.capture = Capture(captured.append)
    prompts = ["def main():\n    ", "import os\nimport ", "class A:\n    def __init__(self"]
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    done = llm.generate(prompts, params)
    assert engine.stats.accepted_tokens > 10 and engine.stats.draft_tokens > engine.stats.accepted_tokens
    outputs = {tuple(one.tokens.tolist()): one.states for one in by_request(captured).values()}
    assert outputs.keys() == {tuple(one.tokens) for one in done}
    for one in done:
        prompt = llm.tokenizer.encode(one.prompt)
        hidden = prefilled(executor, [*prompt, *one.tokens])[len(prompt) - 1 : -1]
        assert torch.equal(outputs[tuple(one.tokens)], hidden.to(torch.bfloat16)), "native kernels: the same bits"


def prefilled(executor: Executor, tokens: list[int]) -> Tensor:
    """Final hidden states of all tokens, from one prefill."""
    cache = executor.model.cache(blocks := -(-len(tokens) // 16), 16)
    plan = StepPlan(tokens, [0], [len(tokens)], [list(range(blocks))], list(range(len(tokens))))
    with torch.inference_mode():
        return executor.forward.alone(plan, torch.tensor(tokens), cache).clone()


def test_two_ranks(directory: Path) -> None:
    def rank_main(mesh: Mesh) -> tuple[Texts, list[Captured]] | None:
        executor = whole_executor(ModelSpec.load(directory), str(directory), mesh, LIMITS.num_blocks, LIMITS.block_size)
        if mesh.shard.rank:
            executor.follow()
            return None
        captured = list[Captured]()
        texts, _ = serve(executor, requests(), Fickle(serve(executor, requests())[0]), 4, Capture(captured.append))
        executor.stop()
        return texts, captured

    found = run_ranks(2, rank_main)[0]
    assert found
    texts, captured = found
    check(captured, requests(), texts)
    states = by_request(captured)[number_of(requests()[0])].states
    assert torch.allclose(states.float(), states_of(directory, requests()[0], texts["0"][0]), rtol=CLOSE, atol=CLOSE)


def test_attention_ranks_with_a_pool_of_ffn_ranks(directory: Path) -> None:
    spec, captured, texts = ModelSpec.load(directory), list[Captured](), dict[str, Any]()
    with pool_of(directory, 2) as pool:

        def attention() -> None:
            executor = attention_executor(spec, str(directory), membership(spec, pool), 1, 8)
            executor.allocate(LIMITS.num_blocks, LIMITS.block_size)
            texts.update(serve(executor, requests(), capture=Capture(captured.append))[0])
            executor.stop()

        thread = threading.Thread(target=attention, daemon=True)
        thread.start()
        thread.join(120)
    check(captured, requests(), texts)


def test_what_must_not_be_learnt_from_leaves_nothing(executor: Executor, plain: Texts) -> None:
    """Beside others, in the same steps."""
    made = [replace(request, learn=int(request.id) % 3 > 0, domain=f"d{int(request.id) % 2}") for request in requests()]
    captured = list[Captured]()
    capture = Capture(captured.append, 8)
    texts, _ = serve(executor, made, Fickle(plain), 4, capture)
    assert texts == plain
    check(captured, [request for request in made if request.learn], plain)
    domains = {number_of(request): request.domain for request in made}
    assert all(one.domain == domains[one.request] for one in captured)
    assert not capture._pieces and not capture._on_the_way


def test_what_a_request_had_is_given_when_it_is_aborted(executor: Executor) -> None:
    captured, engine = list[Captured](), Engine(LIMITS, executor)
    engine.capture = Capture(captured.append)
    long = Request(id="a", prompt=(1, 2, 3), params=SamplingParams(max_tokens=50, ignore_eos=True))
    engine.add(long)
    wrote = [token for _ in range(9) for output in engine.step() for token in output.tokens]
    assert wrote and not captured
    engine.abort("a")
    assert [one.lesson.tokens.tolist() for one in captured] == [wrote]


def test_it_may_begin_late_and_stop_for_a_while(executor: Executor, plain: Texts) -> None:
    """There are no gaps within a piece, and steps that were queued without it are no error."""
    captured, made = list[Captured](), [replace(one, params=replace(one.params, logprobs=None)) for one in requests()]
    engine, capture = Engine(replace(LIMITS, lookahead=1), executor), Capture(captured.append)
    written: dict[str, list[int]] = {request.id: [] for request in made}
    for request in made:
        engine.add(request)
    for step in range(10_000):
        if not engine.has_work:
            break
        engine.capture = capture if step % 7 > 2 else None
        for output in engine.step():
            written[output.id] += output.tokens
    texts = {number_of(request): written[request.id] for request in made}
    assert len(captured) > len(made)
    for one in captured:
        text, found = texts[one.request], one.lesson.tokens.tolist()
        assert any(text[at : at + len(found)] == found for at in range(len(text)))


class Slow:
    """In place of `Download`, what there is on CUDA: states come to the host when their time has come."""

    made: "list[Slow]"

    def __init__(self, tensors: tuple[Tensor, ...], device: torch.device) -> None:
        self.tensors, self.landed, self.waited = list(tensors), False, 0
        Slow.made.append(self)

    def wait(self) -> list[Tensor]:
        self.waited += not self.landed
        self.landed = True
        return self.tensors


def test_nobody_waits_for_what_is_on_its_way(executor: Executor, plain: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow.made = []
    monkeypatch.setattr(module, "Download", Slow)
    captured = list[Captured]()
    capture = Capture(captured.append, 8)
    _, engine = serve(executor, requests(), Fickle(plain), 4, capture)
    assert len(Slow.made) > 20 and not captured and not any(one.waited for one in Slow.made)
    for one in Slow.made[1:4]:
        one.landed = True
    capture.observe([])
    assert not captured, "in order"
    Slow.made[0].landed = True
    capture.observe([])
    assert len(capture._on_the_way) == len(Slow.made) - 4
    engine.heartbeat()
    check(captured, requests(), plain)
    assert not capture._pieces and not capture._on_the_way


@pytest.mark.parametrize("drafting", [False, True])
def test_a_ring_that_overflows_serves_the_same_texts(executor: Executor, plain: Texts, drafting: bool) -> None:
    ring = Ring(6000)
    texts, _ = serve(executor, requests(), Fickle(plain) if drafting else None, 4, Capture(ring.put, 4))
    assert texts == plain
    assert ring.stats.captured_tokens == sum(len(text[0]) for text in plain.values())
    assert 0 < ring.stats.held_bytes <= 6000 and ring.stats.dropped_tokens > 0
    left = sum(len(one.lesson.tokens) for one in ring.take(10_000))
    assert left + ring.stats.dropped_tokens == ring.stats.captured_tokens and not ring.stats.held_bytes
