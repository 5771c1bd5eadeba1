"""The oracle of overlap: real asynchronous handles and reduces waited for at once are bitwise equal."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import KVCache, PagedSequences
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.residual import Pending, Reduce, immediate
from stepladder.parallel.spec import ModelSpec
from tests.ranks import run_ranks

WIRINGS: list[tuple[str, tuple[int, ...] | None]] = [
    ("standard", None),
    ("ladder", None),
    ("parallel", None),
    ("ladder-parallel", None),
    ("ladder", (1, 2)),
    ("ladder", (0, 2)),
    ("ladder-parallel", (1,)),
]


@torch.inference_mode()
def prefill_and_decode(spec: ModelSpec, path: Path, mesh: Mesh, reduce: Reduce) -> list[Tensor]:
    """Final hidden states of one prefill step of three prompts and of three decode steps."""
    model = Transformer(spec, mesh.shard, reduce)
    load_weights(model, path)
    cache = KVCache(spec, model.num_kv_heads, 24, 4)
    tables = [list(range(i * 8, i * 8 + 8)) for i in range(3)]
    draw = torch.Generator().manual_seed(4)
    outputs, starts, lengths = [], [0, 0, 0], [11, 5, 20]
    for _ in range(4):
        tokens = torch.randint(0, spec.vocab_size, (sum(lengths),), generator=draw)
        outputs.append(model(tokens, PagedSequences(cache, starts, lengths, tables)))
        starts, lengths = [s + n for s, n in zip(starts, lengths, strict=True)], [1, 1, 1]
    return outputs


@pytest.mark.parametrize("tp", [2, 4])
def test_overlapped_reduces_are_bitwise_equal_to_immediate_ones(tp: int, untied: Path) -> None:
    base = ModelSpec.load(untied)
    wirings = WIRINGS if tp == 2 else WIRINGS[1:2]

    def rank_main(mesh: Mesh) -> list[tuple[list[Tensor], list[Tensor]]]:
        specs = [replace(base, residual=residual, ladder_layers=layers) for residual, layers in wirings]
        return [
            (
                prefill_and_decode(spec, untied, mesh, mesh.all_reduce),
                prefill_and_decode(spec, untied, mesh, immediate(mesh.all_reduce)),
            )
            for spec in specs
        ]

    ranks = run_ranks(tp, rank_main)
    for wiring, results in zip(wirings, zip(*ranks, strict=True), strict=True):
        first = results[0][0]
        for overlapped, waited in results:  # on every rank
            for step, (a, b, c) in enumerate(zip(overlapped, waited, first, strict=True)):
                assert torch.equal(a, b), f"{wiring}, step {step}"
                assert torch.equal(a, c), f"{wiring}, step {step}: the ranks' streams differ"


FAMILY_WIRINGS = [
    ("llama3", "ladder"),  # biases everywhere, also behind the reduces
    ("llama3", "ladder-parallel"),
    ("qwen2", "ladder"),  # windows in two layers of three
    ("mistral", "parallel"),
    ("cohere", "standard"),
    ("cohere", "ladder-parallel"),
]


def test_overlap_is_bitwise_exact_with_biases_and_windows_which_ranks_add_once(families: dict[str, Path]) -> None:
    """Two ranks, every step; one rank gives the same up to rounding, so that no bias is added twice or forgotten."""
    specs = [replace(ModelSpec.load(families[f]), residual=r, dtype=torch.float64) for f, r in FAMILY_WIRINGS]

    def rank_main(mesh: Mesh) -> list[tuple[list[Tensor], ...]]:
        reduces = (mesh.all_reduce, immediate(mesh.all_reduce))
        return [
            tuple(prefill_and_decode(spec, families[f], mesh, reduce) for reduce in reduces)
            for spec, (f, _) in zip(specs, FAMILY_WIRINGS, strict=True)
        ]

    ranks = run_ranks(2, rank_main)
    alone = run_ranks(1, rank_main)[0]
    for case, results, (whole, _) in zip(FAMILY_WIRINGS, zip(*ranks, strict=True), alone, strict=True):
        for overlapped, waited in results:
            for a, b, one in zip(overlapped, waited, whole, strict=True):
                assert torch.equal(a, b), case
                torch.testing.assert_close(a, one, rtol=0, atol=1e-10, msg=str(case))


class _Noted:
    def __init__(self, pending: Pending, note: Callable[[], None]) -> None:
        self.pending, self.note = pending, note

    def wait(self) -> Tensor:
        self.note()
        return self.pending.wait()


@pytest.mark.parametrize(("residual", "lag"), [("standard", 0), ("ladder", 1), ("parallel", 0), ("ladder-parallel", 1)])
def test_a_reduce_is_waited_for_exactly_lag_blocks_later(residual: str, lag: int, untied: Path) -> None:
    """Order of events on real handles: with lag 1, the reduce of block k+1 is issued before that of k is waited for."""
    spec = replace(ModelSpec.load(untied), residual=residual)

    def rank_main(mesh: Mesh) -> list[tuple[str, int]]:
        events: list[tuple[str, int]] = []

        def reduce(partial: Tensor) -> Pending:
            number = sum(kind == "issue" for kind, _ in events)
            events.append(("issue", number))
            return _Noted(mesh.all_reduce(partial), lambda: events.append(("wait", number)))

        model = Transformer(spec, mesh.shard, reduce)
        load_weights(model, untied)
        cache = KVCache(spec, model.num_kv_heads, 4, 4)
        with torch.inference_mode():
            model(torch.arange(3), PagedSequences(cache, [0], [3], [[0]]))
        return events

    events = run_ranks(2, rank_main)[0]
    last = len(events) // 2 - 1  # 0 is the embedding's reduce
    assert events.index(("wait", 0)) == 1
    for number in range(1, last - lag):
        assert events.index(("wait", number)) == events.index(("issue", number + lag)) + 1
    assert sorted(events) == sorted((kind, n) for kind in ("issue", "wait") for n in range(last + 1))
    issued = [events[:i].count(("issue", n)) for i, (kind, n) in enumerate(events) if kind == "wait"]
    assert all(issued), "waited for before it was issued"
