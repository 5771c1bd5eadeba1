"""Where a rank stands, and which part of which checkpoint tensor its parameter is made of."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Shard(NamedTuple):
    """One rank's place in a tensor-parallel group.

    Attributes:
        shares: how many of the items that `split` cuts each rank gets; () gives all of them equally many, or the first
            ones one more.
    """

    rank: int = 0
    size: int = 1
    shares: tuple[int, ...] = ()

    @property
    def equal(self) -> "Shard":
        """The same place where all get equally much."""
        return Shard(self.rank, self.size)

    def split(self, total: int, what: str) -> range:
        """This rank's part of `total` items.

        Raises:
            ValueError: there is not one for each rank.
        """
        if total < self.size:
            raise ValueError(
                f"{what} is {total}, which {self.size} tensor-parallel ranks cannot share; lower layout.tp, or "
                "layout.ffn with layout=afd"
            )
        shares = self.shares or equal_shares(total, self.size)
        assert len(shares) == self.size and sum(shares) == total, "shares are of what is split"
        start = sum(shares[: self.rank])
        return range(start, start + shares[self.rank])


def equal_shares(total: int, size: int) -> tuple[int, ...]:
    """As equal as whole numbers can be, the larger ones first."""
    return tuple(total // size + (rank < total % size) for rank in range(size))


ALONE = Shard()


@dataclass(frozen=True)
class Placement:
    """One rank's place in the groups that share each kind of module. Embedding and head are shared as attention is.

    Attributes:
        whole_experts: ranks hold whole experts; else each a part of every expert.
        home: rows live on one rank of the group each, which computes all of them but the experts that others hold.
    """

    attention: Shard = ALONE
    ffn: Shard = ALONE
    experts: Shard = ALONE
    whole_experts: bool = False
    home: bool = False

    @classmethod
    def of(cls, place: "Placement | Shard") -> "Placement":
        """Of a rank whose only group shares everything alike, if `place` is a Shard."""
        return cls(place, place, place) if isinstance(place, Shard) else place

    @property
    def held(self) -> Shard:
        """Whose share of whole experts this rank has; all of them, if each is cut."""
        return self.experts if self.whole_experts else ALONE

    @property
    def shared(self) -> Shard:
        """Whose share of a shared expert."""
        return ALONE if self.home else self.experts

    @property
    def inside(self) -> Shard:
        """Whose share of each expert."""
        return ALONE if self.whole_experts else self.experts


class Piece(NamedTuple):
    """`tensor[name]` from `start` to `stop` along `dim`; it begins at row `offset` of the parameter.

    A parameter may hold pieces of several checkpoint tensors (query, key and value, say, or the matrices of experts),
    one below the other, whichever way they are cut. `shape` is the shape of the whole tensor in the checkpoint, or,
    where that is a `stack` of so many, of one, and the piece is of the one at `place`.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    offset: int = 0
    stack: int = 0
    place: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        return (self.stack, *self.shape) if self.stack else self.shape

    @property
    def size(self) -> int:
        """Its extent along `dim`."""
        return self.stop - self.start

    @property
    def height(self) -> int:
        """Rows of the parameter that it takes."""
        return self.size if self.dim == 0 else self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one of these."""
        return (self.size,) if self.dim else self.shape[1:]


class Sharded(nn.Parameter):
    """A parameter that knows the checkpoint tensors it is cut from."""

    pieces: list[Piece]

    @staticmethod
    def of(*pieces: Piece, dtype: torch.dtype, rows: int | None = None) -> "Sharded":
        """A parameter, not loaded yet, that holds `pieces` one below the other; it may be padded with zeros to
        `rows`."""
        offset, placed = 0, []
        for piece in pieces:
            assert piece.row_shape == pieces[0].row_shape, "pieces of one parameter fit together"
            placed.append(piece._replace(offset=offset))
            offset += piece.height
        assert rows is None or rows >= offset
        parameter = Sharded(torch.zeros(rows or offset, *pieces[0].row_shape, dtype=dtype), requires_grad=False)
        parameter.pieces = placed
        return parameter

    def view_of(self, piece: Piece) -> Tensor:
        """The part of this parameter that `piece` fills."""
        return self.data.narrow(0, piece.offset, piece.height)


def whole(name: str, *shape: int) -> Piece:
    """A tensor that every rank holds whole."""
    return Piece(name, shape, 0, 0, shape[0])


def rows(name: str, shape: tuple[int, ...], part: range) -> Piece:
    """Rows `part` of a matrix or a vector: a column-parallel linear layer in torch's [out, in] layout, or its bias."""
    return Piece(name, shape, 0, part.start, part.stop)


def columns(name: str, shape: tuple[int, int], part: range) -> Piece:
    """Columns `part` of a matrix: a row-parallel linear layer."""
    return Piece(name, shape, 1, part.start, part.stop)
