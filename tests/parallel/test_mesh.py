"""Groups of real ranks: sums, columns, leaving, and the meter of hidden communication."""

import threading
from time import perf_counter

import pytest
import torch

from stepladder.parallel.mesh import Mesh, SingleRank
from tests.ranks import run_ranks


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_reduces_in_flight_together_do_not_mix(tp: int) -> None:
    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        values = [torch.full((3, 2), 10.0**i * (mesh.shard.rank + 1)) for i in range(4)]
        pending = [mesh.all_reduce(v) for v in values]
        return [p.wait() for p in reversed(pending)][::-1]

    total = tp * (tp + 1) / 2
    for sums in run_ranks(tp, rank_main):
        for i, got in enumerate(sums):
            assert torch.equal(got, torch.full((3, 2), 10.0**i * total))


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_columns_are_joined_on_rank_0(tp: int) -> None:
    whole = torch.arange(24.0).view(2, 12)
    parts = run_ranks(tp, lambda mesh: mesh.gather(whole.chunk(tp, dim=1)[mesh.shard.rank]))  # views, not contiguous
    assert parts[0] is not None and torch.equal(parts[0], whole)
    assert parts[1:] == [None] * (tp - 1)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_rank_0_shares_a_tensor(tp: int) -> None:
    drawn = torch.tensor([7, 0, 2**40])
    parts = run_ranks(tp, lambda mesh: mesh.share(drawn.clone() if mesh.shard.rank == 0 else torch.zeros_like(drawn)))
    assert all(torch.equal(part, drawn) for part in parts)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_go_to_whoever_they_are_for(ranks: int) -> None:
    """Uneven numbers of rows, none among them, of any dtype."""

    def rank_main(mesh: Mesh) -> torch.Tensor:
        counts = [mesh.shard.rank * to for to in range(mesh.shard.size)]
        rows = torch.tensor([[mesh.shard.rank, to, i] for to, count in enumerate(counts) for i in range(count)])
        told = mesh.exchange(torch.tensor(counts), [1] * len(counts), [1] * len(counts)).tolist()
        assert told == [sender * mesh.shard.rank for sender in range(mesh.shard.size)]
        return mesh.exchange(rows.view(-1, 3).to(torch.uint8), counts, told)

    for rank, came in enumerate(run_ranks(ranks, rank_main)):
        wanted = [[sender, rank, i] for sender in range(ranks) for i in range(sender * rank)]
        assert came.tolist() == wanted and came.dtype == torch.uint8


def test_a_rank_that_leaves_fails_the_others_at_once() -> None:
    """Not after the timeout."""
    waited: list[float] = []

    def rank_main(mesh: Mesh) -> None:
        if mesh.shard.rank == 1:
            raise RuntimeError("rank 1 has had enough")
        begun = perf_counter()
        try:
            mesh.all_reduce(torch.ones(1)).wait()
        finally:
            waited.append(perf_counter() - begun)

    with pytest.raises(RuntimeError, match="rank 1 has had enough"):
        run_ranks(2, rank_main, timeout=20)
    assert waited[0] < 10


def test_a_silent_rank_fails_the_others_after_the_timeout() -> None:
    release = threading.Event()

    def rank_main(mesh: Mesh) -> None:
        if mesh.shard.rank == 1:
            release.wait(20)
            return
        try:
            mesh.all_reduce(torch.ones(1)).wait()
        finally:
            release.set()

    with pytest.raises(RuntimeError, match="Timed out"):
        run_ranks(2, rank_main, timeout=0.3)


def test_the_meter_tells_hidden_from_exposed_time() -> None:
    """Rank 1 issues its reduce late: rank 0 either stands and waits (exposed) or works meanwhile (hidden)."""

    def rank_main(mesh: Mesh) -> tuple[float | None, float | None, float]:
        matrix, shares = torch.randn(128, 128), []
        for busy in (False, True):
            mesh.broadcast([0] if mesh.shard.rank == 0 else None)
            mesh.meter.total = mesh.meter.exposed = 0.0
            mesh.meter.on = True
            if mesh.shard.rank == 1:
                _work(matrix, 0.1)
            pending = mesh.all_reduce(torch.ones(4))
            if busy and mesh.shard.rank == 0:
                _work(matrix, 0.4)
            assert torch.equal(pending.wait(), torch.full((4,), 2.0))
            shares.append(mesh.meter.hidden_share)
        return shares[0], shares[1], mesh.meter.total

    standing, working, total = run_ranks(2, rank_main)[0]
    assert standing is not None and standing < 0.2
    assert working == 1.0 and total > 0.05
    assert SingleRank().meter.hidden_share is None


def test_every_metered_reduce_counts() -> None:
    """Also one that is over before anybody waits, or just when somebody does."""

    def rank_main(mesh: Mesh) -> int:
        mesh.meter.on, counted = True, 0
        for _ in range(200):
            before = mesh.meter.total
            mesh.all_reduce(torch.ones(64)).wait()
            counted += mesh.meter.total > before
        assert 0 <= mesh.meter.exposed <= mesh.meter.total
        return counted

    assert run_ranks(2, rank_main) == [200, 200]


def _work(matrix: torch.Tensor, seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        matrix @ matrix
