"""Head and cross-entropy slice by slice: the logits of a whole batch fit no cache, and on a GPU not the memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.parallel.model import Transformer

LOSS_ROWS = 256  # logits of this many tokens at a time: 4 MB at 4096 words, which stays in cache


def sliced_cross_entropy(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `targets` [T] under the head's logits of `hidden` [T, hidden]: a scalar, fp32."""
    loss: Tensor = _Sliced.apply(hidden, model.head.weight, targets, model)
    return loss


class _Sliced(torch.autograd.Function):
    """Finds the gradients together with the loss, as no slice's logits are kept (Hsu et al. 2410.10989 §3.2)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, model: Transformer) -> Tensor:
        total, of_weight, of_hidden = torch.zeros((), device=hidden.device), torch.zeros_like(weight), []
        for part, wanted in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = F.cross_entropy(model.logits(part).float(), wanted, reduction="sum") / len(targets)
            part_gradient, weight_gradient = torch.autograd.grad(loss, (part, model.head.weight))
            of_hidden.append(part_gradient)
            of_weight += weight_gradient
            total += loss.detach()
        ctx.save_for_backward(torch.cat(of_hidden), of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * gradients[0], of_weight * gradients[0], None, None
