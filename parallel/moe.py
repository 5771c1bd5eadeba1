"""The mixture of experts of a layer: a router that every rank has, and this rank's part of the experts.

Letters: T tokens, h hidden, E experts, k of these per token, I this rank's part of an expert's inner size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepladder.kernels.moe import mix, route
from stepladder.parallel.modules import Norm, Product
from stepladder.parallel.shards import Piece, Placement, Sharded, columns, rows, whole
from stepladder.parallel.spec import ModelSpec


class MixtureOfExperts(nn.Module):
    """SwiGLU networks, of which each token passes through k, and perhaps one that all pass through.

    Every rank routes for itself, on the same rows with the same weights. Where a rank holds a part of every expert, or
    the whole of some, what it returns is a partial sum, as `FeedForward`'s is.

    Attributes:
        load: tokens that each expert has got in inference, int64 [E].
        across: computes the experts of rows that live here, those that other ranks hold included; None if all ranks
            have the same rows.
        balance: in training, how unevenly the experts were used by the last tokens, for the loss: `unevenness`.
    """

    PRODUCTS: ClassVar = {
        "score": Product("router", wide=True),
        "shared_in": Product("shared_gate_up", gated=True, wide=True),
        "shared_out": Product("shared_down", wide=True),
    }
    load: Tensor
    across: Callable[..., Tensor] | None = None
    balance: Tensor | None = None

    def __init__(self, spec: ModelSpec, layer: int, place: Placement) -> None:
        super().__init__()
        assert spec.experts
        e, h = spec.experts, spec.hidden_size
        self.per_token, self.renormalise, self.count = e.per_token, e.renormalise, e.count
        self.gated, self.shared = e.shared_gate, e.shared_inner > 0
        name, held = partial(spec.tensor, layer=layer), place.held.split(e.count, "the number of experts")
        part = place.inside.split(e.inner, "the intermediate size of an expert")
        self.first, self.held = held.start, len(held)
        self.register_buffer("load", torch.zeros(e.count, dtype=torch.int64), persistent=False)
        self.norm = Norm(spec, whole(name("ffn.norm"), h))
        gate = [whole(name("moe.shared_switch"), 1, h)] if e.shared_gate else []
        self.router = Sharded.of(whole(name("moe.router"), e.count, h), *gate, dtype=spec.dtype)
        stack = e.count if spec.stacked_experts else 0

        def of_expert(cut: Callable[..., Piece], what: str, i: int, *shape: int) -> Piece:
            piece = cut(name(what, expert=i), shape, part)
            return piece._replace(stack=stack, place=i) if stack else piece

        ins = (of_expert(rows, p, i, e.inner, h) for i in held for p in ("moe.gate", "moe.up"))
        outs = (of_expert(columns, "moe.down", i, h, e.inner) for i in held)
        self.gate_up, self.down = Sharded.of(*ins, dtype=spec.dtype), Sharded.of(*outs, dtype=spec.dtype)
        self.shared_gate_up = self.shared_down = None
        if self.shared:
            size, mine = e.shared_inner, place.shared.split(e.shared_inner, "the intermediate size of a shared expert")
            self.shared_gate_up = Sharded.of(
                *(rows(name(p), (size, h), mine) for p in ("moe.shared_gate", "moe.shared_up")), dtype=spec.dtype
            )
            self.shared_down = Sharded.of(columns(name("moe.shared_down"), (h, size), mine), dtype=spec.dtype)

    def forward(self, x: Tensor, context: Any) -> Tensor:
        """[T, h] -> partial [T, h]."""
        normed = self.norm(x)
        scores = self.score(normed)
        weights, chosen = route(scores[:, : self.count], self.per_token, self.renormalise)
        if torch.is_inference_mode_enabled():
            self._count(chosen.flatten())
        elif self.training and torch.is_grad_enabled():
            self.balance = unevenness(scores[:, : self.count], chosen)
        total = self.across(self.mix, normed, weights, chosen) if self.across else self.mix(normed, weights, chosen)
        if self.shared:
            shared = self.shared_out(self.shared_in(normed)).to(total.dtype)
            total = total + (scores[:, self.count :].to(total.dtype).sigmoid() * shared if self.gated else shared)
        return total.to(x.dtype)

    def _count(self, chosen: Tensor) -> None:
        self.load.scatter_add_(0, chosen, torch.ones_like(chosen))

    def score(self, x: Tensor) -> Tensor:
        """What the router says of each expert, [T, E], and behind it of the shared expert's switch, if it has one."""
        return F.linear(x, self.router)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`kernels.moe.mix` of the experts held here."""
        gate_up, down = (part.view(self.held, -1, part.shape[-1]) for part in (self.gate_up, self.down))
        experts = [partial(_swiglu, gate_up[i], down[i]) for i in range(self.held)]
        return mix(x, weights, chosen, experts, self.first)

    def shared_in(self, x: Tensor) -> Tensor:
        """[T, h] -> what the shared expert's gates let through."""
        gate, up = F.linear(x, self.shared_gate_up).chunk(2, dim=-1)  # type: ignore[arg-type]
        return F.silu(gate) * up

    def shared_out(self, inner: Tensor) -> Tensor:
        """The shared expert's partial sum [T, h]."""
        return F.linear(inner, self.shared_down)  # type: ignore[arg-type]


def unevenness(scores: Tensor, chosen: Tensor) -> Tensor:
    """The load-balancing loss of Switch Transformers (Fedus et al. 2101.03961, equation 4) for k experts per token: E
    times the sum over experts of its share of the pairs and its mean probability. 1 if all are used alike.

    Args:
        scores: [T, E], what the router says. chosen: [T, k], the experts.
    """
    count = scores.shape[1]
    shares = torch.bincount(chosen.flatten(), minlength=count) / chosen.numel()
    return count * (shares * scores.softmax(-1, dtype=torch.float32).mean(0)).sum()


def _swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
