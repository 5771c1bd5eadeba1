"""How to train: the numbers of a run, checked, and the schedule that follows from them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; which model and which text is the recipe's business.

    seed: of the first weights and of the order of the text. tokens: in all, rounded down to whole steps. batch_tokens:
    of one step, over all ranks. accumulate: micro-batches a rank cuts its share of a step into. contexts: window
    lengths in tokens, each for an equal share of the steps, in this order. warmup, decay: the shares of all steps in
    which the learning rate rises from and falls to 0, linearly.

    muon_lr: Muon's (Jordan et al. 2024) for the matrices inside the blocks; null trains those with AdamW too, and then
    `weight_decay` is AdamW's. adam_lr: of everything else. clip: the gradient's largest norm, or null; only without
    Muon, since DeepSpeed clips after Muon has orthogonalised, which would scale its updates down and nothing else.

    balance: the weight in the loss of how unevenly experts are used (parallel/moe.py), summed over the layers; null
    for a model without experts.

    weight_decay: of the matrices. precision: fp32, or bf16 for torch's autocast. log_every, checkpoint_every: steps.
    """

    seed: int
    tokens: int
    batch_tokens: int
    accumulate: int
    contexts: tuple[int, ...]
    muon_lr: float | None
    adam_lr: float
    weight_decay: float
    warmup: float
    decay: float
    clip: float | None
    balance: float | None
    precision: str
    log_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "accumulate", "adam_lr", "log_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("muon_lr", "clip", "balance"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be above 0, or null")
        if self.muon_lr is not None and self.clip is not None:
            raise ValueError("train.clip works with AdamW only; set train.clip=null, or train.muon_lr=null")
        for length in self.contexts:
            if length < 1 or self.batch_tokens % length:
                raise ValueError(
                    f"train.contexts has {length}; it must divide train.batch_tokens ({self.batch_tokens})"
                )
        if not self.contexts or self.steps < len(self.contexts):
            raise ValueError(f"train.tokens is {self.tokens}; every one of train.contexts needs at least one step")
        if min(self.warmup, self.decay, self.weight_decay) < 0 or self.warmup + self.decay > 1:
            raise ValueError("train.warmup and train.decay are shares of the run; neither negative, at most 1 together")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"train.precision is {self.precision!r}; it must be bf16 or fp32")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def share(self, stage: int, ranks: int) -> int:
        """Windows of one micro-batch of one rank.

        Raises:
            ValueError: the windows of a step cannot be dealt out evenly.
        """
        windows, parts = self.batch_tokens // self.contexts[stage], ranks * self.accumulate
        if windows % parts:
            raise ValueError(
                f"train.batch_tokens={self.batch_tokens} makes {windows} windows of {self.contexts[stage]} tokens, "
                f"which {ranks} ranks with train.accumulate={self.accumulate} cannot share evenly; change one of them"
            )
        return windows // parts

    def stage(self, step: int) -> tuple[int, int]:
        """(index into `contexts`, first step of that stage) of a step."""
        stage = step * len(self.contexts) // self.steps
        return stage, -(-stage * self.steps // len(self.contexts))

    def lr_scale(self, step: int) -> float:
        """Trapezoid (Hägele et al. 2405.18392): linear warm-up, constant, linear to 0."""
        warmup, decay = self.warmup * self.steps, self.decay * self.steps
        return min(1.0, (step + 1) / max(warmup, 1), (self.steps - step) / max(decay, 1))
