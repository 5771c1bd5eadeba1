"""The training text as windows: every token once per pass, in an order that is a function of the seed."""

import torch
from torch import Tensor


class TextWindows:
    """An endless shuffled sequence of windows of `length + 1` tokens; each pass cuts the stream at another offset.

    Raises:
        ValueError: the stream is shorter than two windows.
    """

    def __init__(self, stream: Tensor, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.per_pass = (len(stream) - 1) // length - 1
        if self.per_pass < 1:
            raise ValueError(f"the training text has {len(stream)} tokens; windows of {length} need {2 * length + 1}")
        self._pass, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> Tensor:
        """Window `index`: int64 [length + 1]."""
        number, place = divmod(index, self.per_pass)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number * 101 + self.length)
            offset = int(torch.randint(self.length, (1,), generator=generator))
            self._starts = torch.randperm(self.per_pass, generator=generator) * self.length + offset
            self._pass = number
        start = int(self._starts[place])
        return self.stream[start : start + self.length + 1].long()

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of `count` windows: two int64 [count * length]."""
        windows = torch.stack([self[first + i] for i in range(count)])
        return windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1)
