"""Speculative sampling (Leviathan et al. 2211.17192, Chen et al. 2302.01318): which drafted tokens are accepted, and
what is drawn where one is not, so that every token has the law that plain decoding gives it.

A token x drafted from q is accepted with probability min(1, p(x) / q(x)); else one is drawn from max(p - q, 0),
normalised. Behind the last accepted one the next is drawn from p itself. p is what the sampler draws from: with the
request's own penalties, temperature and truncation. q must be what the token was really drawn from.
"""

from torch import Tensor


def accepted(scores: Tensor, drafted: Tensor, u: Tensor, q: Tensor | None = None) -> Tensor:
    """Which drafted tokens are accepted where their row is reached: bool [R].

    Args:
        scores: fp32 [R, vocab], log p up to a constant for each row.
        drafted: int64 [R]. u: fp32 [R], uniform in (0, 1), of nothing else's making.
        q: fp32 [R, vocab], the law that each was drawn from; None of a drafter that does not draw: all of q is there.
    """
    p = scores.softmax(-1).gather(-1, drafted[:, None])[:, 0]
    return u < p if q is None else u * q.gather(-1, drafted[:, None])[:, 0] < p


def residual(scores: Tensor, drafted: Tensor, q: Tensor | None = None) -> Tensor:
    """log max(p - q, 0) up to a constant, [R, vocab]: what a token is drawn from in place of one that is rejected."""
    if q is None:
        return scores.scatter(-1, drafted[:, None], float("-inf"))
    return (scores.softmax(-1) - q).clamp_min(0).log()
