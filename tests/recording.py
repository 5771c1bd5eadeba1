"""What a CUDA graph does, on a CPU: record the operations of a function once, then repeat them on the same memory.

Whatever the function asked the host for is frozen in the recording, as it would be in a graph: a number read from a
tensor, a Python list, a shape that depends on values. So the second replay shows what cannot be captured.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepladder.kernels.transfer import upload


class Recording(TorchDispatchMode):
    """The operations called inside, with the very tensors they had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, _tensors(result)))
        return result

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `Capture` for CPU ranks that are alone: what goes through a process group is not seen."""
    recording = Recording()
    with recording:
        output = function()

    def replay() -> Tensor:
        recording.replay()
        return output

    return replay


def call(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `Capture` for any CPU rank: call it again."""
    return function


class WaitsForNothing(TorchDispatchMode):
    """Refuses what on CUDA would make the host wait for the device: values read from tensors, shapes that depend on
    values, and lists that become tensors other than through `upload`."""

    READS = ("aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.resolve_conj")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rsplit(".", 1)[0]
        assert name not in self.READS, f"{name} waits for the device"
        if name == "aten.lift_fresh":
            assert not args[0].dim() or _inside_upload(), "a list becomes a tensor without `upload`"
        if name in ("aten.index", "aten.index_put_"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), "a mask as an index waits for the device"
        return function(*args, **(kwargs or {}))


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _inside_upload() -> bool:
    frame = inspect.currentframe()
    while frame and frame.f_code is not upload.__code__:
        frame = frame.f_back
    return frame is not None
