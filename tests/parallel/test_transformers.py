"""The sharded model against `transformers`, position by position, however its tokens are cut into steps."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepladder.parallel.balance import place_of
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import PagedSequences, WholeSequences
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.native import TORCH, choose
from stepladder.parallel.spec import ModelSpec
from tests.llama import oracle_logits, read_llama, write_llama
from tests.ranks import run_ranks

BLOCK_SIZE, NUM_BLOCKS = 4, 64


def load(
    path: Path,
    mesh: Mesh,
    kernels: str = TORCH,
    dtype: torch.dtype = torch.float32,
    whole_experts: bool = False,
) -> Transformer:
    spec = replace(ModelSpec.load(path), dtype=dtype)
    model = Transformer(spec, place_of(spec, mesh.shard, whole_experts=whole_experts), mesh.all_reduce)
    load_weights(model, path)
    choose(model, kernels)
    return model


def all_logits(model: Transformer, mesh: Mesh, hidden: Tensor) -> Tensor:
    """Every rank's columns joined, without the padding: on rank 0."""
    joined = mesh.gather(model.logits(hidden))
    return torch.empty(0) if joined is None else joined[:, : model.spec.vocab_size]


def cuts(length: int, prompt: int, chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of each step of one sequence: the prompt in chunks, then one token at a time."""
    chunks = [(start, min(start + chunk, prompt)) for start in range(0, prompt, chunk)]
    return chunks + [(at, at + 1) for at in range(prompt, length)]


def step_batches(sequences: list[list[int]], chunk: int) -> list[list[tuple[int, int, int]]]:
    """Steps of (sequence, start, stop): sequence i arrives in step i and decodes its last 6 tokens, so that most
    steps mix decode with prefill chunks of several lengths."""
    plans = [cuts(len(s), max(1, len(s) - 6), chunk + i % 2) for i, s in enumerate(sequences)]
    steps: list[list[tuple[int, int, int]]] = [[] for _ in range(max(i + len(p) for i, p in enumerate(plans)))]
    for index, plan in enumerate(plans):
        for at, (start, stop) in enumerate(plan):
            steps[index + at].append((index, start, stop))
    return steps


@torch.inference_mode()
def run_in_steps(model: Transformer, mesh: Mesh, sequences: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits of every position of every sequence, computed step by step over the paged cache."""
    free = random.Random(chunk).sample(range(NUM_BLOCKS), NUM_BLOCKS)  # blocks in no order
    tables = [[free.pop() for _ in range(-(-len(s) // BLOCK_SIZE))] for s in sequences]
    cache = model.cache(NUM_BLOCKS, BLOCK_SIZE)
    cache.keys.fill_(1e3)  # what an earlier sequence left behind must not be seen
    cache.values.fill_(1e3)
    rows: list[list[Tensor]] = [[] for _ in sequences]
    for batch in step_batches(sequences, chunk):
        starts, lengths = [b for _, b, _ in batch], [e - b for _, b, e in batch]
        context = PagedSequences(cache, starts, lengths, [tables[i][: -(-e // BLOCK_SIZE)] for i, _, e in batch])
        tokens = torch.tensor([t for i, b, e in batch for t in sequences[i][b:e]])
        logits = all_logits(model, mesh, model(tokens, context))
        if mesh.shard.rank == 0:
            for (index, _, _), part in zip(batch, logits.split(lengths), strict=True):
                rows[index].append(part)
    return [torch.cat(parts) for parts in rows if parts]


@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_equal_transformers_in_prefill_chunks_and_decode(
    tp: int, checkpoint: str, prompts: list[list[int]], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(checkpoint)
    oracle = read_llama(path)
    wanted = [oracle_logits(oracle, p) for p in prompts]
    bound = 1e-4 * max(float(w.abs().max()) for w in wanted)
    chunks = (64, 9, 3, 1) if tp < 4 else (64, 9)

    def rank_main(mesh: Mesh) -> list[list[Tensor]]:
        model = load(path, mesh)
        return [run_in_steps(model, mesh, prompts, chunk) for chunk in chunks]

    for chunk, sequences in zip(chunks, run_ranks(tp, rank_main)[0], strict=True):
        for got, want in zip(sequences, wanted, strict=True):
            assert (got - want).abs().max() <= bound, f"chunks of {chunk}"


def test_everything_is_made_on_the_default_device(untied: Path) -> None:
    """The executor builds the model under its rank's device; nothing may stay behind on the CPU."""
    with torch.device("meta"):
        model = Transformer(ModelSpec.load(untied))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


@torch.inference_mode()
def test_whole_sequences_equal_transformers(untied: Path) -> None:
    tokens = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(3))
    model = Transformer(ModelSpec.load(untied))
    load_weights(model, untied)
    got = model.logits(model(tokens.view(-1), WholeSequences(3, 20))).view(3, 20, -1)
    want = read_llama(untied)(tokens).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("fields", "tp", "sentence"),
    [
        (
            {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3},
            4,
            "num_attention_heads is 3, 1 for each of 3 KV heads, which 4 tensor-parallel",
        ),
        (
            {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
            7,
            "num_attention_heads is 6, 2 for each of 3 KV heads, which 7 tensor-parallel",
        ),
        ({"intermediate_size": 3}, 4, "intermediate_size is 3, which 4 tensor-parallel"),
    ],
)
def test_what_ranks_cannot_share_is_refused(tmp_path: Path, fields: dict[str, int], tp: int, sentence: str) -> None:
    spec = ModelSpec.load(write_llama(tmp_path, **fields))

    def rank_main(mesh: Mesh) -> None:
        with pytest.raises(ValueError, match=sentence):
            Transformer(spec, mesh.shard, mesh.all_reduce)

    run_ranks(tp, rank_main)
