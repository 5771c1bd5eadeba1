"""What a drafter's distribution q is taught to do about the target's p. All are 0 where q = p, and only there.

Each takes log-probabilities [N, V] of both over the same tokens, fp32, and gives the loss of every place, [N], in nats
(`tv`: a probability). alpha = sum_v min(p_v, q_v) is the acceptance of rejection sampling (Leviathan et al. 2211.17192,
theorem 3.5).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DEFAULT", "OBJECTIVES", "Objective", "named"]

Objective = Callable[[Tensor, Tensor], Tensor]
DEFAULT = "forward_kl"
HALF = 0.6931471805599453  # -log of it
HYBRID_DECAY = 3.0


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p log(p / q): covers all that the target may say. Hinton et al. 1503.02531; the choice of
    Online Speculative Decoding (Liu et al. 2310.07177)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v q log(q / p): keeps to what the target holds likeliest. MiniLLM (Gu et al. 2306.08543)."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2. GKD (Agarwal et al. 2306.13649), beta 0.5."""
    log_m = torch.logaddexp(log_p, log_q) - HALF
    return (forward_kl(log_p, log_m) + forward_kl(log_q, log_m)) / 2


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - alpha = sum_v |p - q| / 2, the rate of rejections. DistillSpec (Zhou et al. 2310.08461). Its
    gradient vanishes where the two hardly overlap."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def nla(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log alpha. LK losses, 2602.23881. Its gradient is `tv`'s over alpha, and so does not vanish."""
    return -torch.minimum(log_p, log_q).logsumexp(-1)


def lk_hybrid(log_p: Tensor, log_q: Tensor) -> Tensor:
    """w KL(p || q) + (1 - w) TV(p, q) with w = exp(-3 alpha), through which no gradient flows: the divergence while the
    two are far apart, later ever more of the rejections themselves. LK losses, 2602.23881."""
    missed = tv(log_p, log_q)
    weight = torch.exp(-HYBRID_DECAY * (1 - missed.detach()))
    return weight * forward_kl(log_p, log_q) + (1 - weight) * missed


OBJECTIVES: dict[str, Objective] = {
    each.__name__: each for each in (forward_kl, reverse_kl, jsd, tv, nla, lk_hybrid)
}  # fmt: skip


def named(name: str) -> Objective:
    """Raises ValueError if there is none of this name."""
    if name not in OBJECTIVES:
        raise ValueError(f"there is no objective {name!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
