"""What a checkpoint says of its mixture of experts."""

from dataclasses import dataclass

__all__ = ["ExpertSpec"]


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Feed-forward networks of which each token passes through a few, chosen by a router.

    Attributes:
        layers: that have experts, ascending; the others have one feed-forward network.
        count: of experts. per_token: how many of these a token passes through.
        inner: intermediate size of an expert. shared_inner: of one that all tokens pass through; 0 for none.
        shared_gate: whether that one's output is multiplied by a sigmoid of its own.
        renormalise: whether the weights of a token's experts sum to 1; else they are what the router's softmax over all
            experts gives.
    """

    layers: tuple[int, ...]
    count: int
    per_token: int
    inner: int
    shared_inner: int = 0
    shared_gate: bool = False
    renormalise: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ValueError(
                f"num_experts_per_tok is {self.per_token}; it must be from 1 to the number of experts, {self.count}"
            )
        if self.inner < 1 or self.shared_inner < 0:
            raise ValueError(f"the intermediate size of experts is {self.inner}, {self.shared_inner} of a shared one")
        assert tuple(sorted(set(self.layers))) == self.layers and (self.shared_inner or not self.shared_gate)
