"""Each objective against its formula in fp64, its gradient, and where both vanish."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stepladder.workers.speculation.learning.objectives import DEFAULT, OBJECTIVES, named

Array = np.ndarray


def kl(a: Array, b: Array) -> Array:
    return (a * np.log(a / b)).sum(-1)


def alpha(p: Array, q: Array) -> Array:
    return np.minimum(p, q).sum(-1)


def hybrid(p: Array, q: Array) -> Array:
    weight = np.exp(-3 * alpha(p, q))
    return weight * kl(p, q) + (1 - weight) * (1 - alpha(p, q))


FORMULAS: dict[str, Callable[[Array, Array], Array]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "tv": lambda p, q: 1 - alpha(p, q),
    "nla": lambda p, q: -np.log(alpha(p, q)),
    "lk_hybrid": hybrid,
}


def logits(scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return scale * torch.randn(7, 53), scale * torch.randn(7, 53)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_its_formula(name: str, scale: float) -> None:
    of_p, of_q = logits(scale)
    p, q = (each.double().softmax(-1).numpy() for each in (of_p, of_q))
    found = OBJECTIVES[name](of_p.log_softmax(-1), of_q.log_softmax(-1))
    assert found.shape == (7,)
    np.testing.assert_allclose(found.numpy(), FORMULAS[name](p, q), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_gradient_is_the_formulas(name: str) -> None:
    """By differences of the formula; the hybrid's weight is held fast, since no gradient flows through it."""
    of_p, of_q = (each.double() for each in logits(1.0, 1))
    of_q.requires_grad_(True)
    OBJECTIVES[name](of_p.log_softmax(-1), of_q.log_softmax(-1)).sum().backward()
    p, q = of_p.softmax(-1).numpy(), of_q.detach().softmax(-1).numpy()
    weight = np.exp(-3 * alpha(p, q))

    def formula(changed: Array) -> Array:
        if name == "lk_hybrid":
            return weight * kl(p, changed) + (1 - weight) * (1 - alpha(p, changed))
        return FORMULAS[name](p, changed)

    step = 1e-6
    for column in (0, 11, 52):
        nudge = torch.zeros(53, dtype=torch.float64)
        nudge[column] = step
        up, down = ((of_q.detach() + sign * nudge).softmax(-1).numpy() for sign in (1, -1))
        want = (formula(up) - formula(down)) / (2 * step)
        np.testing.assert_allclose(of_q.grad[:, column].numpy(), want, rtol=1e-4, atol=1e-7)  # type: ignore[index]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_vanishes_with_its_gradient_where_both_are_the_same(name: str) -> None:
    of_p, _ = logits(2.0)
    of_q = of_p.clone().requires_grad_(True)
    loss = OBJECTIVES[name](of_p.log_softmax(-1), of_q.log_softmax(-1))
    loss.sum().backward()
    assert loss.abs().max() < 1e-5 and of_q.grad.abs().max() < 1e-6  # type: ignore[union-attr]
    other = OBJECTIVES[name](of_p.log_softmax(-1), of_q.detach().roll(1, -1).log_softmax(-1))
    assert other.min() > 1e-2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_finite_where_the_two_do_not_overlap(name: str) -> None:
    """Probabilities of e^-300 are 0 in fp32."""
    of_p, of_q = torch.zeros(1, 4), torch.zeros(1, 4)
    of_p[0, 0] = of_q[0, 3] = 300.0
    of_q.requires_grad_(True)
    loss = OBJECTIVES[name](of_p.log_softmax(-1), of_q.log_softmax(-1))
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(of_q.grad.isfinite().all())  # type: ignore[union-attr]
    moves = name not in (
        "tv",
        "jsd",
        "reverse_kl",
    )  # whose gradients are as small as q is there
    assert not moves or of_q.grad[0, 0] < -0.04  # type: ignore[index]


def test_they_are_chosen_by_name() -> None:
    assert named(DEFAULT) is OBJECTIVES["forward_kl"] and set(OBJECTIVES) == set(FORMULAS)
    with pytest.raises(ValueError, match=r"there is no objective 'mse'; there are forward_kl, reverse_kl, .*lk_hybrid"):
        named("mse")
