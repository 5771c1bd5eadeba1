"""The network of the drafter `head`: one recurrent cell, from a hidden state and a token to the next hidden state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RecurrentHead", "seen"]


class RecurrentHead(nn.Module):
    """Foresees the target's final hidden state after one more token, as EAGLE does (Li et al. 2401.15077), by a cell
    without attention and without a KV cache:

        x = [rms(h), rms(e(token))],  h' = L x + O (silu(A x) * G x),  logits = (rows of the target's head) (s * h')

    The first h is the target's own, each further one that of the cell. The target's embedding and head are not part of
    it. O begins with zeros, so that a linear fit of L is where learning starts.

    Args:
        hidden: size of the target's hidden state. inner: of the cell.
    """

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.hidden, self.inner = hidden, inner
        self.linear = nn.Linear(2 * hidden, hidden, bias=False)
        self.gate = nn.Linear(2 * hidden, inner, bias=False)
        self.up = nn.Linear(2 * hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.scale = nn.Parameter(torch.ones(hidden))
        nn.init.zeros_(self.down.weight)
        with torch.no_grad():
            self.linear.weight.copy_(torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), 1))

    def forward(self, state: Tensor, embedded: Tensor) -> Tensor:
        """The hidden state behind one more token: fp32 [N, hidden], and that token's embedding -> [N, hidden]."""
        x = seen(state, embedded)
        return self.linear(x) + self.down(F.silu(self.gate(x)) * self.up(x))

    def logits(self, state: Tensor, rows: Tensor) -> Tensor:
        """Of the tokens whose rows of the target's head are given: [N, hidden] -> [N, tokens]."""
        return (state * self.scale) @ rows.T

    def is_finite(self) -> bool:
        """Whether all of its weights are numbers."""
        return all(bool(weight.isfinite().all()) for weight in self.state_dict().values())


def seen(state: Tensor, embedded: Tensor) -> Tensor:
    """What the cell reads: [N, hidden] twice -> [N, 2 hidden]."""
    size = state.shape[-1:]
    return torch.cat((F.rms_norm(state, size), F.rms_norm(embedded, size)), -1)
