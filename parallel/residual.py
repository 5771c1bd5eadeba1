"""The residual stream: blocks read it with a lag and add contributions that may still be on their way.

x_0 + c_1 + c_2 + ..., folded in strictly in order and out of place, so that every schedule and every side that holds
a copy rounds alike. With lag 1 this is Ladder Residual (Zhang et al. 2501.06589): x_{k+1} = AR(h_{k+1}(x_{k-1})) + x_k.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Pending(Protocol):
    """A tensor on its way: an all-reduce under way, a message from another pool, or a finished tensor."""

    def wait(self) -> Tensor:
        """The tensor, when it is there. On CUDA the current stream waits, not the host."""
        ...


class Done:
    """A contribution that has already arrived."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> Tensor:
        return self.tensor


Reduce = Callable[[Tensor], Pending]
"""Starts the all-reduce of this rank's partial sum, which it may overwrite."""


def immediate(reduce: Reduce) -> Reduce:
    """The same reduce, waited for at once: what a model without overlap does, and the oracle for overlap."""
    return lambda partial: Done(reduce(partial).wait())


class Fold(NamedTuple):
    """A point of a stream: x [tokens, hidden] with `done` contributions folded in, the last of them `total`."""

    done: int
    x: Tensor
    total: Tensor | None


class ResidualStream:
    """The stream of one batch: x [tokens, hidden] and the contributions not yet folded in.

    Args:
        x: the stream with `done` contributions folded in.
        remember: how many of the newest points to keep in `past`, for a peer that must begin again there.
    """

    def __init__(self, x: Tensor, done: int = 0, remember: int = 0) -> None:
        self._x, self.done = x, done
        self.past = deque([Fold(done, x, None)], maxlen=remember)
        self._late: deque[tuple[Pending, ...]] = deque()

    def input(self, lag: int) -> Tensor:
        """The stream without its `lag` newest contributions [tokens, hidden]; waits for the older ones only."""
        while len(self._late) > lag:
            first, *rest = self._late.popleft()
            total = first.wait()
            for part in rest:
                total = total + part.wait()
            self._x, self.done = self._x + total, self.done + 1
            self.past.append(Fold(self.done, self._x, total))
        return self._x

    def add(self, *parts: Pending) -> None:
        """Append one contribution, its parts summed in the order given."""
        self._late.append(parts)

    def settle(self) -> Tensor:
        """Everything added: what the final norm reads."""
        return self.input(0)


class Block:
    """Modules that read one input and share one reduce.

    Args:
        lag: how many of the newest contributions this block does not see.
        modules: each maps (x [tokens, hidden], step context) to this rank's partial sum [tokens, hidden]; none where
            all of the block is computed elsewhere.
        elsewhere: the pools of ranks that compute the rest of this block, if it is split over several.
        layer, seats: where in the model it stands, the seats of modules elsewhere included.
    """

    def __init__(
        self,
        lag: int,
        modules: Iterable[Callable[[Tensor, Any], Tensor]],
        elsewhere: Sequence[str] = (),
        layer: int = 0,
        seats: Sequence[str] = (),
    ) -> None:
        self.lag = lag
        self.modules = tuple(modules)
        self.elsewhere = tuple(elsewhere)
        self.layer, self.seats = layer, tuple(seats)

    @property
    def name(self) -> str:
        """For a person: "attention 3", or "attention+ffn 3" where they share a block."""
        return f"{'+'.join(self.seats)} {self.layer}"

    def __call__(self, x: Tensor, context: Any) -> Tensor:
        total = self.modules[0](x, context)
        for module in self.modules[1:]:
            total = total + module(x, context)
        return total


Contribute = Callable[[int, Block, int, ResidualStream, Any], Sequence[Pending]]
"""How a side of the model gets a block's contribution for one micro-batch: from the number of the block, the block, the
number of the micro-batch, its stream and its context, the parts, in the order to add up."""


def run_blocks(
    blocks: Sequence[Block], streams: Sequence[ResidualStream], contexts: Sequence[Any], contribute: Contribute
) -> list[Tensor]:
    """The model between embedding and final norm, for one or several micro-batches in rotation: the whole model and
    either side of a disaggregated one. It goes on where the streams are. Results: [tokens, hidden] of each stream."""
    for number in range(streams[0].done, len(blocks)):
        for micro, (stream, context) in enumerate(zip(streams, contexts, strict=True)):
            stream.add(*contribute(number, blocks[number], micro, stream, context))
    return [stream.settle() for stream in streams]


def together(reduce: Reduce) -> Contribute:
    """All modules are here; the ranks of one group add up their partial sums."""

    def contribute(number: int, block: Block, micro: int, stream: ResidualStream, context: Any) -> Sequence[Pending]:
        return (reduce(block(stream.input(block.lag), context)),)

    return contribute
