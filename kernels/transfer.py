"""Numbers between host and device without waiting: steps are queued ahead of the device only if nothing on the way to
the queue waits for it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Nested lists of numbers, or an array, as a tensor on `device`.

    On CUDA they go through pinned memory. `torch.tensor(values, device="cuda")` copies from pageable memory, for which
    the host waits until everything queued before it is done.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Download:
    """Tensors on their way from `device` to the host."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._tensors, self._landed = list(tensors), None
        if device.type == "cuda":
            self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch makes it pinned memory
            self._landed = torch.cuda.Event()
            self._landed.record(torch.cuda.current_stream(device))

    @property
    def landed(self) -> bool:
        """Whether they are on the host, so that nobody waits for them."""
        return self._landed is None or self._landed.query()

    def wait(self) -> list[Tensor]:
        """They are on the host; so is everything done that was queued on the device before them."""
        if self._landed:
            self._landed.synchronize()
        return self._tensors
