"""Training from scratch on one rank: windows over a token stream, Muon and AdamW, a fixed number of tokens.

Everything a step does is a function of (seed, step) and the state of the last one, so that a run that was killed
and resumed from its checkpoint ends with the weights of an uninterrupted one.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from parallel.checkpoint import sharded_parameters
from parallel.model import Transformer
from workers.training_context import TiledSequences

LOSS_ROWS = 256  # logits of this many tokens at a time: 4 MB at 4096 words, which stays in cache
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; which model and which text is the recipe's business.

    tokens: in all, rounded down to whole steps. batch_tokens: of one step. contexts: window lengths in tokens, each
    for an equal share of the steps, in this order. warmup, decay: the shares of all steps in which the learning rate
    rises from and falls to 0, linearly. muon_lr: of the matrices inside the blocks; adam_lr: of embedding and norms.
    """

    seed: int
    tokens: int
    batch_tokens: int
    contexts: tuple[int, ...]
    muon_lr: float
    adam_lr: float
    weight_decay: float
    warmup: float
    decay: float
    clip: float
    precision: str
    log_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        positive = ("tokens", "batch_tokens", "muon_lr", "adam_lr", "clip", "log_every", "checkpoint_every")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be above 0")
        for length in self.contexts:
            if length < 1 or self.batch_tokens % length:
                raise ValueError(
                    f"train.contexts has {length}; it must divide train.batch_tokens ({self.batch_tokens})"
                )
        if self.steps < len(self.contexts) or not self.contexts:
            raise ValueError(f"train.tokens is {self.tokens}; every one of train.contexts needs at least one step")
        if min(self.warmup, self.decay, self.weight_decay) < 0 or self.warmup + self.decay > 1:
            raise ValueError("train.warmup and train.decay are shares of the run; neither negative, at most 1 together")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"train.precision is {self.precision!r}; it must be bf16 or fp32")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def stage(self, step: int) -> tuple[int, int]:
        """(index into `contexts`, first step of that stage) of a step."""
        stage = step * len(self.contexts) // self.steps
        return stage, -(-stage * self.steps // len(self.contexts))

    def lr_scale(self, step: int) -> float:
        """Trapezoid (Hägele et al. 2405.18392): linear warm-up, constant, linear to 0."""
        warmup, decay = self.warmup * self.steps, self.decay * self.steps
        return min(1.0, (step + 1) / max(warmup, 1), (self.steps - step) / max(decay, 1))


class Windows:
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


class Trainer:
    """One model, its optimisers and how far it has come.

    Args:
        model: a whole, initialised model; its parameters are set to require gradients.
        stream: the training text, int [tokens].
        directory: where `trainer.pt` is kept; a checkpoint found there is continued.
    """

    def __init__(self, model: Transformer, stream: Tensor, config: TrainConfig, directory: Path) -> None:
        self.model, self.config = model.train(), config
        self.checkpoint = directory / "trainer.pt"
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self.matrices = _matrices(model)
        self.optimizers = _optimizers(model, self.matrices, config)
        self.windows = [Windows(stream, length, config.seed) for length in config.contexts]
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            self._load()

    def run(self, log: Log, until: int | None = None) -> Iterator[int]:
        """Train, yielding the number of steps done after each; ends at `until` or the configured number of tokens.

        Raises:
            RuntimeError: the loss is no longer a number.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        losses, since = [], time.monotonic()
        while self.step < last:
            loss, norm = self._train_step()
            losses.append(loss)
            if self.step % self.config.log_every == 0 or self.step == last:
                seconds, since = time.monotonic() - since, time.monotonic()
                self.seconds += seconds
                log(self._metrics(losses, norm, seconds))
                losses = []
            if self.step % self.config.checkpoint_every == 0:
                self.save()
            yield self.step

    def save(self) -> None:
        """Write the state so that a kill at any moment leaves the old file or the new one."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["config"] != asdict(self.config):
            raise ValueError(f"{self.checkpoint} was written with other settings; remove it or choose another run_dir")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def _train_step(self) -> tuple[float, float]:
        """One optimiser step: (mean loss in nats per token, norm of the gradient before clipping)."""
        config, (stage, first_step) = self.config, self.config.stage(self.step)
        batch = config.batch_tokens // config.contexts[stage]
        inputs, targets = self.windows[stage].batch((self.step - first_step) * batch, batch)
        loss = self._backward(inputs, targets, TiledSequences(batch, config.contexts[stage]))
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if not math.isfinite(loss + norm):
            raise RuntimeError(f"the loss is {loss} at step {self.step}; lower train.muon_lr and train.adam_lr")
        for matrix in self.matrices:
            matrix.take_gradient()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * config.lr_scale(self.step)
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        return loss, norm

    def _backward(self, inputs: Tensor, targets: Tensor, context: TiledSequences) -> float:
        """Accumulate the gradients. Head and loss go slice by slice: the logits of a whole batch fit no cache."""
        total = 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            hidden = self.model(inputs, context)
            slices = [part.detach().requires_grad_() for part in hidden.split(LOSS_ROWS)]
            for part, wanted in zip(slices, targets.split(LOSS_ROWS), strict=True):
                loss = F.cross_entropy(self.model.logits(part).float(), wanted, reduction="sum") / len(targets)
                loss.backward()
                total += loss.item()
        hidden.backward(torch.cat([part.grad for part in slices]))
        return total

    def _metrics(self, losses: list[float], norm: float, seconds: float) -> dict[str, Any]:
        return {
            "train/step": self.step,
            "train/tokens": self.step * self.config.batch_tokens,
            "train/loss": sum(losses) / len(losses),
            "train/grad_norm": norm,
            "train/lr_scale": self.config.lr_scale(self.step - 1),
            "train/tokens_per_s": len(losses) * self.config.batch_tokens / seconds,
        }


class Matrix(nn.Parameter):
    """One checkpoint matrix inside a merged parameter (query in query-key-value, say), sharing its storage.

    Muon orthogonalises what it is given; query, key and value are three matrices, not one tall one.
    """

    owner: nn.Parameter
    part: slice

    @staticmethod
    def of(owner: nn.Parameter, part: slice) -> "Matrix":
        matrix = Matrix(owner.data[part])
        matrix.owner, matrix.part = owner, part
        return matrix

    def take_gradient(self) -> None:
        assert self.owner.grad is not None
        self.grad = self.owner.grad[self.part]


def _matrices(model: Transformer) -> list[Matrix]:
    """The matrices inside the blocks, each as the checkpoint names it."""
    vocabulary = {id(model.embedding.weight), id(model.head.weight)}
    hidden = [p for p in sharded_parameters(model) if p.dim() == 2 and id(p) not in vocabulary]
    return [
        Matrix.of(parameter, slice(piece.offset, piece.offset + piece.shape[0]))
        for parameter in hidden
        for piece in parameter.pieces
    ]


def _optimizers(model: Transformer, matrices: list[Matrix], config: TrainConfig) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for embedding, head and norms."""
    owners = {id(matrix.owner) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in owners]
    muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95)
    adam = AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]
