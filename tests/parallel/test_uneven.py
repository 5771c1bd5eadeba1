"""Any number of ranks: heads, FFN columns and vocabulary rows that do not divide by it, against the whole model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepladder.parallel.balance import balanced
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.heads import heads_of
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import FeedForward
from stepladder.parallel.shards import Placement, Shard, equal_shares
from stepladder.parallel.spec import ModelSpec
from tests.llama import write_llama
from tests.parallel.test_transformers import all_logits, run_in_steps
from tests.ranks import run_ranks

HEADS = [(9, 3), (7, 7), (5, 1), (12, 4)]
TOKENS = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(1))


def spec_of(heads: int, kv_heads: int, **fields: int) -> ModelSpec:
    return ModelSpec(
        vocab_size=101, hidden_size=8 * heads, intermediate_size=53, num_layers=3, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=8, max_position=64, norm_eps=1e-6, rope_theta=1e4, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS, (16, 2), (6, 3), (8, 8)])
@pytest.mark.parametrize("ranks", range(1, 6))
def test_every_query_head_is_somewhere_with_its_kv_head(heads: int, kv_heads: int, ranks: int) -> None:
    parts = [heads_of(spec_of(heads, kv_heads), Shard(rank, ranks)) for rank in range(ranks)]
    assert [head for part in parts for head in part.query] == list(range(heads)), "each once, in order"
    for query, kv in parts:
        assert len(query) % len(kv) == 0 and len(query), "as kernels want it"
        assert {head * kv_heads // heads for head in query} == set(kv)
    counts = [len(part.query) for part in parts]
    group = heads // kv_heads
    assert max(counts) - min(counts) <= (group if kv_heads >= ranks else group - 1 or 1)


@pytest.mark.parametrize("residual", ["standard", "ladder"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@torch.inference_mode()
def test_the_ranks_together_are_the_whole_model(
    tmp_path: Path, heads: int, kv_heads: int, ranks: int, residual: str
) -> None:
    """FFN with 53 columns, vocabulary of 101; in prefill chunks and decode over each rank's own KV cache, too. In fp64,
    so that nothing but rounding is forgiven."""
    path = write_llama(
        tmp_path, hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8,
        intermediate_size=53, vocab_size=101,
    )  # fmt: skip
    spec = replace(ModelSpec.load(path), residual=residual, dtype=torch.float64)
    whole = Transformer(spec).requires_grad_(False)
    load_weights(whole, path)
    want = whole.logits(whole(TOKENS.view(-1), WholeSequences(2, 13)))

    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        found = []
        for placement in (Placement.of(mesh.shard), balanced(spec, mesh.shard)):
            model = Transformer(spec, placement, mesh.all_reduce).requires_grad_(False)
            load_weights(model, path)
            found.append(all_logits(model, mesh, model(TOKENS.view(-1), WholeSequences(2, 13))))
            steps = run_in_steps(model, mesh, TOKENS.tolist(), chunk=5)
            found += [torch.cat(steps)] if steps else []
        return found

    for got in run_ranks(ranks, rank_main)[0]:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * float(want.abs().max()))


def weights(spec: ModelSpec, place: Placement) -> int:
    """Of the blocks of one rank."""
    with torch.device("meta"):
        return sum(
            p.numel() for block in Transformer(spec, place).blocks for m in block.modules for p in m.parameters()
        )


def smollm2() -> ModelSpec:
    return replace(spec_of(9, 3), hidden_size=576, head_dim=64, intermediate_size=1536, num_layers=2, vocab_size=512)


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_balance_evens_the_weights_of_ranks_out(ranks: int) -> None:
    """SmolLM2's 9 heads and 3 KV heads: without it, the heaviest rank has a fifth more than the lightest."""
    spec = replace(smollm2(), residual="ladder")
    even, auto = (
        [weights(spec, place(rank)) for rank in range(ranks)]
        for place in (lambda r: Placement.of(Shard(r, ranks)), lambda r: balanced(spec, Shard(r, ranks)))
    )
    assert sum(auto) == sum(even)
    assert max(even) / min(even) > 1.15
    assert max(auto) / min(auto) < 1.02


def test_where_all_wait_for_the_slowest_of_each_module_ffns_stay_even() -> None:
    """The standard wiring, and the standard layers of a mixed model; a parallel block is waited for as a whole."""
    for fields, expected in (
        ({"residual": "standard"}, [768, 768]),
        ({"residual": "parallel"}, [688, 688]),
        ({"residual": "ladder", "ladder_layers": (1,)}, [768, 688]),
    ):
        spec = replace(smollm2(), **fields)
        with torch.device("meta"):
            model = Transformer(spec, balanced(spec, Shard(0, 2)))
        modules = [m for m in model.modules_of_blocks if isinstance(m, FeedForward)]
        assert [module.down.shape[1] for module in modules] == expected


def test_balance_changes_nothing_where_attention_is_even() -> None:
    assert balanced(smollm2(), Shard(1, 3)) == Placement.of(Shard(1, 3))
    assert balanced(spec_of(8, 8), Shard(0, 2)) == Placement.of(Shard(0, 2))


@pytest.mark.parametrize("inner", [5, 16, 53, 1536, 100_003])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_shares_are_of_all_columns_and_nobody_has_none(inner: int, ranks: int) -> None:
    spec = replace(spec_of(9, 3), intermediate_size=inner)
    found = [balanced(spec, Shard(rank, ranks)).ffn for rank in range(ranks)]
    assert len({shard.shares for shard in found}) == 1
    parts = [shard.split(inner, "intermediate_size") for shard in found]
    assert [column for part in parts for column in part] == list(range(inner))
    assert all(map(len, parts))


def test_equal_shares() -> None:
    assert equal_shares(7, 3) == (3, 2, 2) and equal_shares(6, 3) == (2, 2, 2)
