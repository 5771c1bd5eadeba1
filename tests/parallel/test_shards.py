"""Parameters cut from several checkpoint tensors, by rows and by columns."""

import torch

from stepladder.parallel.shards import ALONE, Placement, Shard, Sharded, columns, rows


def test_pieces_of_columns_lie_side_by_side() -> None:
    a, b = torch.arange(12.0).view(3, 4), torch.arange(100.0, 118.0).view(3, 6)
    parameter = Sharded.of(columns("a", (3, 4), range(1, 3)), columns("b", (3, 6), range(3, 6)), dtype=torch.float32)
    for piece, tensor in zip(parameter.pieces, (a, b), strict=True):
        parameter.view_of(piece).copy_(tensor[:, piece.start : piece.stop])
    assert torch.equal(parameter.data, torch.cat((a[:, 1:3], b[:, 3:6]), dim=1))
    assert [parameter.view_of(piece).shape for piece in parameter.pieces] == [(3, 2), (3, 3)]


def test_pieces_of_rows_lie_below_each_other_and_are_padded() -> None:
    parameter = Sharded.of(rows("a", (4, 2), range(1, 3)), rows("b", (5, 2), range(5)), dtype=torch.float32, rows=9)
    for value, piece in enumerate(parameter.pieces, start=1):
        parameter.view_of(piece).fill_(value)
    assert parameter[:, 0].tolist() == [1.0] * 2 + [2.0] * 5 + [0.0] * 2


def test_a_placement_of_one_shard_is_alike_everywhere() -> None:
    place = Placement.of(Shard(1, 3))
    assert place == Placement(Shard(1, 3), Shard(1, 3), Shard(1, 3)) and Placement.of(place) is place
    assert Placement(ffn=Shard(0, 2)) == Placement(ALONE, Shard(0, 2), ALONE)
