"""Parameters cut from several checkpoint tensors, by rows and by columns."""

import pytest
import torch

from stepladder.parallel.shards import ALONE, Placement, Shard, Sharded, columns, rows


def test_pieces_cut_by_columns_lie_below_each_other() -> None:
    a, b = torch.arange(12.0).view(3, 4), torch.arange(100.0, 108.0).view(2, 4)
    cut = columns("a", (3, 4), range(1, 3)), columns("b", (2, 4), range(2, 4)), rows("c", (4, 2), range(1, 2))
    parameter = Sharded.of(*cut, dtype=torch.float32)
    for piece, tensor in zip(parameter.pieces, (a, b), strict=False):
        parameter.view_of(piece).copy_(tensor[:, piece.start : piece.stop])
    parameter.view_of(parameter.pieces[2]).fill_(7)
    assert torch.equal(parameter.data, torch.cat((a[:, 1:3], b[:, 2:4], torch.full((1, 2), 7.0))))
    assert [(piece.offset, piece.height) for piece in parameter.pieces] == [(0, 3), (3, 2), (5, 1)]
    with pytest.raises(AssertionError):
        Sharded.of(columns("a", (3, 4), range(1, 3)), columns("b", (3, 6), range(3, 6)), dtype=torch.float32)


def test_pieces_of_rows_lie_below_each_other_and_are_padded() -> None:
    parameter = Sharded.of(rows("a", (4, 2), range(1, 3)), rows("b", (5, 2), range(5)), dtype=torch.float32, rows=9)
    for value, piece in enumerate(parameter.pieces, start=1):
        parameter.view_of(piece).fill_(value)
    assert parameter[:, 0].tolist() == [1.0] * 2 + [2.0] * 5 + [0.0] * 2


def test_a_placement_of_one_shard_is_alike_everywhere() -> None:
    place = Placement.of(Shard(1, 3))
    assert place == Placement(Shard(1, 3), Shard(1, 3), Shard(1, 3)) and Placement.of(place) is place
    assert Placement(ffn=Shard(0, 2)) == Placement(ALONE, Shard(0, 2), ALONE)
