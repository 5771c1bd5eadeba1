"""Routing and mixing, against a loop over tokens; the native form against the definition, its bits in any company."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.kernels.cpu.experts import Experts
from stepladder.kernels.moe import mix, route
from tests.kernels.native_checks import DTYPES, close

HIDDEN, COUNT, TOKENS = 40, 7, 33


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def some(inner: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(COUNT, 2 * inner, HIDDEN, generator=g) * HIDDEN**-0.5
    return gate_up.to(dtype), (torch.randn(COUNT, HIDDEN, inner, generator=g) * inner**-0.5).to(dtype)


def routed(tokens: int, per_token: int, renormalise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens + per_token)
    x, logits = torch.randn(tokens, HIDDEN, generator=g), 2 * torch.randn(tokens, COUNT, generator=g)
    return x, *route(logits, per_token, renormalise)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("per_token", [1, 3, COUNT])
def test_a_token_goes_to_the_likeliest(per_token: int, renormalise: bool) -> None:
    logits = torch.randn(TOKENS, COUNT, generator=torch.Generator().manual_seed(1))
    weights, chosen = route(logits.bfloat16(), per_token, renormalise)
    shares = logits.bfloat16().float().softmax(-1)
    assert weights.dtype == torch.float32 and chosen.shape == weights.shape == (TOKENS, per_token)
    for row in range(TOKENS):
        best = sorted(range(COUNT), key=lambda e: (-float(shares[row, e]), e))[:per_token]
        assert chosen[row].tolist() == best
        want = shares[row, best] / (shares[row, best].sum() if renormalise else 1)
        torch.testing.assert_close(weights[row], want)
    assert route(logits.double(), per_token, renormalise)[0].dtype == torch.float64


def test_of_equals_the_lowest_wins() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0] * 5])
    assert route(logits, 2, True)[1].tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("held", [range(COUNT), range(2, 5), range(6, 7), range(0)])
def test_each_token_gets_what_its_experts_here_give(held: range) -> None:
    gate_up, down = (part.double() for part in some(12))
    x, weights, chosen = routed(TOKENS, 3)
    asked = list[int]()

    def expert(number: int, rows: Tensor) -> Tensor:
        asked.append(number)
        return swiglu(gate_up[number], down[number], rows)

    experts: list[Callable[[Tensor], Tensor]] = [partial(expert, number) for number in held]
    got = mix(x.double(), weights.double(), chosen, experts, held.start)
    for row in range(TOKENS):
        want = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, number in zip(weights[row].double(), chosen[row].tolist(), strict=True):
            if number in held:
                want += weight * swiglu(gate_up[number], down[number], x[row : row + 1].double())[0]
        torch.testing.assert_close(got[row], want)
    assert asked == sorted({n for n in chosen.flatten().tolist() if n in held}), "once each, none without rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "tokens", "per_token"), [(12, 1, 1), (24, 33, 3), (100, 9, 7), (352, 64, 2)])
def test_native_experts_are_the_definition(dtype: torch.dtype, inner: int, tokens: int, per_token: int) -> None:
    gate_up, down = some(inner, dtype, seed=inner)
    x, weights, chosen = routed(tokens, per_token)
    for held in (range(COUNT), range(3, 6)):
        part = slice(held.start, held.stop)
        native = Experts.of(gate_up[part].flatten(0, 1), down[part].flatten(0, 1), len(held), held.start)
        wide: list[Callable[[Tensor], Tensor]] = [partial(swiglu, gate_up[i].double(), down[i].double()) for i in held]
        want = mix(x.double(), weights.double(), chosen, wide, held.start)
        close(native(x, weights, chosen), want, 4e-6, least=1.0)


def test_a_rows_bits_are_its_own() -> None:
    native = Experts.of(*(part.flatten(0, 1) for part in some(96)), COUNT)
    x, weights, chosen = routed(200, 2)
    whole, g = native(x, weights, chosen), torch.Generator().manual_seed(3)
    for count in (1, 2, 5, 17, 120):
        rows = torch.randperm(200, generator=g)[:count]
        assert torch.equal(native(x[rows], weights[rows], chosen[rows]), whole[rows])


def test_no_tokens_are_nothing() -> None:
    native = Experts.of(*(part.flatten(0, 1) for part in some(12)), COUNT)
    x, weights, chosen = (tensor[:0] for tensor in routed(4, 2))
    for mixed in (native(x, weights, chosen), mix(x, weights, chosen, [lambda rows: rows] * COUNT)):
        assert mixed.shape == (0, HIDDEN)


def test_experts_can_be_learnt() -> None:
    """Gradients reach the experts that were chosen, their weights, and nobody else."""
    gate_up, down = (part.requires_grad_() for part in some(12))
    x, _, _ = routed(5, 2)
    logits = torch.randn(5, COUNT, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, chosen = route(logits, 2, True)
    mix(x, weights, chosen, [partial(swiglu, gate_up[i], down[i]) for i in range(COUNT)]).square().sum().backward()
    assert gate_up.grad is not None and logits.grad is not None
    used = set(chosen.flatten().tolist())
    assert {i for i in range(COUNT) if gate_up.grad[i].abs().sum() > 0} == used != set(range(COUNT))
    assert (logits.grad.abs().sum(-1) > 0).all()
