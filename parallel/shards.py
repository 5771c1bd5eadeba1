"""Which part of which checkpoint tensor a rank's parameter is made of."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Shard(NamedTuple):
    """One rank's place in a tensor-parallel group."""

    rank: int = 0
    size: int = 1

    def split(self, total: int, what: str) -> range:
        """This rank's equal part of `total` items.

        Raises:
            ValueError: `total` is not a multiple of the group's size.
        """
        if total % self.size:
            raise ValueError(
                f"{what} is {total}, which {self.size} tensor-parallel ranks cannot share; change layout.tp, or "
                "layout.ffn with layout=afd"
            )
        part = total // self.size
        return range(self.rank * part, (self.rank + 1) * part)


class Piece(NamedTuple):
    """`tensor[name]` from `start` to `stop` along `dim`; it lies at row `offset` of the parameter.

    `rows` and `cols` of one parameter may come from several checkpoint tensors (query, key and value, say) stacked
    along dimension 0. `shape` is the shape of the whole tensor in the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    offset: int = 0


class Sharded(nn.Parameter):
    """A parameter that knows the checkpoint tensors it is cut from."""

    pieces: list[Piece]

    @staticmethod
    def of(*pieces: Piece, dtype: torch.dtype, rows: int | None = None) -> "Sharded":
        """An uninitialised parameter that holds `pieces` stacked along dimension 0, padded with zeros to `rows`."""
        first = pieces[0]
        if first.dim == 0:
            height = sum(piece.stop - piece.start for piece in pieces)
            shape: tuple[int, ...] = (rows or height, *first.shape[1:])
        else:
            shape = (first.shape[0], first.stop - first.start)
        parameter = Sharded(torch.zeros(shape, dtype=dtype), requires_grad=False)
        offset, placed = 0, []
        for piece in pieces:
            placed.append(piece._replace(offset=offset))
            offset += piece.stop - piece.start
        parameter.pieces = placed
        return parameter

    def view_of(self, piece: Piece) -> Tensor:
        """The part of this parameter that `piece` fills."""
        return self.data if piece.dim else self.data[piece.offset : piece.offset + piece.stop - piece.start]


def whole(name: str, *shape: int) -> Piece:
    """A tensor that every rank holds whole."""
    return Piece(name, shape, 0, 0, shape[0])


def rows(name: str, shape: tuple[int, ...], part: range) -> Piece:
    """Rows `part` of a matrix or a vector: a column-parallel linear layer in torch's [out, in] layout, or its bias."""
    return Piece(name, shape, 0, part.start, part.stop)


def columns(name: str, shape: tuple[int, int], part: range) -> Piece:
    """Columns `part` of a matrix: a row-parallel linear layer."""
    return Piece(name, shape, 1, part.start, part.stop)
