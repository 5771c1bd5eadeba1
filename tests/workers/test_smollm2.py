"""SmolLM2, fetched as users fetch it, against `transformers`' own loading of the same GGUF file, in every layout."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from stepladder.parallel.mesh import Mesh
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.pool_forward import attention_executor
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.rank import PoolAddress
from stepladder.workers.scheduler import SchedulerConfig
from stepladder.workers.text.tokenizer import Tokenizer
from tests.gguf_files import read_gguf_oracle
from tests.parallel.test_transformers import load, run_in_steps
from tests.ranks import run_ranks
from tests.smollm2 import gguf_of_smollm2
from tests.workers.test_afd import membership, pool_of

COUNT = 64
CONFIG = SchedulerConfig(max_sequences=20, max_step_tokens=256, max_model_len=256, num_blocks=320, block_size=16)
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Explain photosynthesis to a child.",
    "Give me three synonyms of happy.",
    "What does HTTP stand for?",
    "Tell me a short story about a fox.",
    "How do I boil an egg?",
    "Name the largest planet of our solar system.",
    "What is a prime number?",
    "Write a Python function that reverses a string.",
    "Is a tomato a fruit or a vegetable?",
    "naïve café, größer, Ελληνικά, 日本語 😀: which languages are these?",
]
CHATS = [
    *([{"role": "user", "content": question}] for question in QUESTIONS),
    *(
        [
            {"role": "system", "content": system},
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hello, how can I help?"},
            {"role": "user", "content": "Tell me about rivers."},
        ]
        for system in ("You are a pirate.", "Answer in one word.", "Du sprichst Deutsch.", "Be rude.", "Be brief.  ")
    ),
]

# of every prompt: its tokens, and the logits of prompt and tokens, or else the log-probabilities of the tokens
Answers = tuple[list[list[int]], list[Tensor]]


def tensor_parallel(ranks: int, directory: Path, prompts: list[list[int]]) -> Answers:
    """An engine's greedy tokens, and the logits of the same ranks' model."""

    def rank_main(mesh: Mesh) -> Answers:
        executor = whole_executor(ModelSpec.load(directory), str(directory), mesh, CONFIG.num_blocks, CONFIG.block_size)
        made: list[list[int]] = []
        if mesh.shard.rank:
            executor.follow()
        else:
            made = _generated(Engine(CONFIG, executor), prompts)
            executor.stop()
        del executor
        flat = mesh.broadcast([token for tokens in made for token in tokens] if made else None)
        answers = [flat[at : at + COUNT] for at in range(0, len(flat), COUNT)]
        model = load(directory, mesh)
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        return answers, [rows for one in whole for rows in run_in_steps(model, mesh, [one], 200)]

    return run_ranks(ranks, rank_main, timeout=120)[0]


def apart(attention: int, ffn: int, directory: Path, prompts: list[list[int]]) -> Answers:
    """Engines on attention ranks, each with its share of the prompts, and a pool of FFN ranks."""
    spec, tokens, logprobs = ModelSpec.load(directory), [list[int]() for _ in prompts], [list[float]() for _ in prompts]

    def serve(rank: int, pool: PoolAddress) -> None:
        executor = attention_executor(spec, str(directory), membership(spec, pool, timedelta(seconds=60)), None, 4)
        executor.allocate(CONFIG.num_blocks, CONFIG.block_size)
        engine = Engine(replace(CONFIG, cache_salt=spec.wiring_key), executor)
        engine.heartbeat()
        mine = range(rank, len(prompts), attention)
        found = _generated(engine, [prompts[index] for index in mine], scores := [])
        executor.stop()
        for index, made, scored in zip(mine, found, scores, strict=True):
            tokens[index], logprobs[index] = made, scored

    with pool_of(directory, ffn, seconds=60) as pool:
        threads = [threading.Thread(target=serve, args=(rank, pool), daemon=True) for rank in range(attention)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    return tokens, list(map(torch.tensor, logprobs))


def _generated(engine: Engine, prompts: list[list[int]], scores: list[list[float]] | None = None) -> list[list[int]]:
    """`scores` gets the log-probabilities of each answer's tokens."""
    logprobs = None if scores is None else 0
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    tokens: list[list[int]] = [[] for _ in prompts]
    if scores is not None:
        scores += [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add(Request(id=str(index), prompt=tuple(prompt), params=params))
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.id)].extend(output.tokens)
            if scores is not None:
                scores[int(output.id)].extend(one.logprob for one in output.logprobs or ())
    return tokens


Layout = Callable[[Path, list[list[int]]], Answers]
LAYOUTS = [
    pytest.param(partial(tensor_parallel, 1), id="tp1"),
    pytest.param(partial(tensor_parallel, 2), id="tp2", marks=pytest.mark.slow),
    pytest.param(partial(tensor_parallel, 3), id="tp3", marks=pytest.mark.slow),
    pytest.param(partial(apart, 1, 1), id="1a1f", marks=pytest.mark.slow),
    pytest.param(partial(apart, 2, 1), id="2a1f", marks=pytest.mark.slow),
    pytest.param(partial(apart, 1, 2), id="1a2f", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def chats(smollm2: Path) -> list[list[int]]:
    tokenizer = Tokenizer(smollm2)
    return [tokenizer.encode(tokenizer.chat(chat), add_special_tokens=False) for chat in CHATS]


@pytest.fixture(scope="module")
def gguf(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gguf")
    yield gguf_of_smollm2(folder)
    shutil.rmtree(folder)


def test_chat_prompts_are_the_tokens_of_transformers(chats: list[list[int]], gguf: Path) -> None:
    oracle = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for chat, tokens in zip(CHATS, chats, strict=True):
        assert tokens == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(
    layout: Layout, smollm2: Path, gguf: Path, chats: list[list[int]]
) -> None:
    """The oracle is shown each answer whole: its most likely token at every position is the next one of the answer, so
    that it would have written the very same."""
    answers, logits = layout(smollm2, chats)
    oracle = read_gguf_oracle(gguf)
    for prompt, answer, got in zip(chats, answers, logits, strict=True):
        want = oracle(torch.tensor([[*prompt, *answer]])).logits[0]
        assert len(answer) == COUNT
        assert want[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
        bound = 1e-4 * want.abs().max()
        if got.dim() == 1:
            want = want[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert (got - want).abs().max() <= bound
