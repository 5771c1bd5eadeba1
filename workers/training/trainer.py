"""Training under DeepSpeed: data-parallel ranks, each with its share of a step and of the optimiser's state (ZeRO-1).

Everything a step does is a function of (seed, step) and the state of the last one, so that a run that was killed
and resumed from its checkpoint ends with the weights of an uninterrupted one. Weights, gradients and reductions are
fp32; `precision: bf16` is torch's autocast.

Muon is DeepSpeed's own, whose ZeRO-1 gives every rank the whole gradient of its matrices. It is run without
torch.compile, and on the checkpoint's matrices (stacked.py) rather than with its `muon_num_heads`, which 0.19.8 forgets
where a partition is padded (stage_1_and_2.py, `get_flat_partition`).
"""

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import Norm
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.workers.training.ranks import Ranks
from stepladder.workers.training.sharded import Sharded
from stepladder.workers.training.sliced_loss import sliced_cross_entropy
from stepladder.workers.training.stacked import put_together, take_apart
from stepladder.workers.training.text_windows import TextWindows
from stepladder.workers.training.train_config import TrainConfig
from stepladder.workers.training.training_context import TiledSequences

log = logging.getLogger(__name__)
Log = Callable[[dict[str, Any]], None]


def text_hash(stream: Tensor) -> str:
    """Of a text's tokens: it changes with the text and with the tokenizer. stream: int [tokens], on the CPU."""
    return hashlib.sha256(stream.numpy().data).hexdigest()


class Trainer:
    """One model, its optimiser and how far it has come, on one of the ranks that train it.

    Args:
        model: a whole, initialised fp32 model, alike on all ranks; its parameters are set to require gradients. While
            it trains, its merged matrices are in pieces; `close` puts them together again.
        stream: the training text, int [tokens], on the CPU.
        directory: where checkpoints are kept; one found there is continued.

    Raises:
        ValueError: the checkpoint found there is of other `settings`, or `config.balance` does not suit the model.
    """

    def __init__(self, model: Transformer, stream: Tensor, config: TrainConfig, directory: Path, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model.to(ranks.device).train(), config, ranks
        self.directory = directory / "checkpoint"
        self._mixtures = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
        if config.balance is not None and not self._mixtures:
            raise ValueError(f"train.balance is {config.balance}, but the model has no experts; set train.balance=null")
        if config.precision == "bf16" and not bf16_pays(ranks.device):
            log.warning("this CPU has no instructions for bf16; train.precision=fp32 is many times faster here")
        for stage in range(len(config.contexts)):
            config.share(stage, ranks.size)
        self.windows = [TextWindows(stream, length, config.seed) for length in config.contexts]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self._taken = take_apart(model) if config.muon_lr is not None else []
        self.optimizer = _optimizer(model, config)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        share = config.share(0, ranks.size)
        self.engine = Sharded(model, self.optimizer, ranks, share, config.accumulate, config.clip)
        self.step, self.seconds = 0, 0.0
        self._saved: int | None = None
        self._text = text_hash(stream)
        self._load()

    @property
    def settings(self) -> dict[str, Any]:
        """What this run shares with any checkpoint that it continues; of the text, a hash of its tokens."""
        model = asdict(self.model.spec) | {"dtype": str(self.model.spec.dtype)}
        return {"config": asdict(self.config), "ranks": self.ranks.size, "model": model, "text": self._text}

    def run(self, log: Log, until: int | None = None) -> Iterator[int]:
        """Train, yielding the number of steps done after each; ends at `until` or the configured number of tokens.

        Raises:
            RuntimeError: the loss is no longer a number.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        losses = list[tuple[float, float]]()
        seconds = 0.0  # of steps alone: not of checkpoints, nor of what the caller does between two steps
        while self.step < last:
            began = time.monotonic()
            losses.append(self._train_step())
            spent = time.monotonic() - began
            seconds, self.seconds = seconds + spent, self.seconds + spent
            if self.step % self.config.log_every == 0 or self.step == last:
                log(self._metrics(losses, seconds))
                losses, seconds = [], 0.0
            if self.step % self.config.checkpoint_every == 0:
                self.save()
            yield self.step

    def save(self) -> None:
        """Write the state so that a kill at any moment leaves the old checkpoint or the new one; all ranks call it.

        Nothing is written if this step's is there: its files would be overwritten in place.
        """
        if self._saved == self.step:
            return
        tag = f"step{self.step}"
        state = {"step": self.step, "seconds": self.seconds, **self.settings}
        self.engine.save_checkpoint(self.directory, tag, state)
        dist.barrier()
        if self.ranks.rank == 0:
            partial = self.directory / "latest.partial"
            partial.write_text(tag)
            os.replace(partial, self.directory / "latest")
            for old in self.directory.glob("step*"):
                if old.name != tag:
                    shutil.rmtree(old)
        dist.barrier()
        self._saved = self.step

    def close(self) -> None:
        """Let go of the engine and leave `model` as it came, with its present weights, on every rank."""
        self.engine.destroy()
        put_together(self._taken)
        for parameter in self.model.parameters():
            parameter.data, parameter.grad = parameter.data.clone(), None
            parameter.requires_grad_(False)
        self.model.eval()

    def _load(self) -> None:
        latest = self.directory / "latest"
        if not latest.exists():
            return
        tag = latest.read_text()
        state = self.engine.saved_state(self.directory, tag)
        if others := ", ".join(_differences(state, self.settings)).replace("config.", "train."):
            raise ValueError(
                f"{self.directory} was written with other settings ({others}); remove it or choose another run_dir"
            )
        self.engine.load_checkpoint(self.directory, tag)
        self.step, self.seconds = state["step"], state["seconds"]
        self._saved = self.step

    def _train_step(self) -> tuple[float, float]:
        """One optimiser step: mean loss in nats per token, and how unevenly experts were used, mean of the layers."""
        config, (stage, first_step) = self.config, self.config.stage(self.step)
        length, share = config.contexts[stage], config.share(stage, self.ranks.size)
        first = (self.step - first_step) * (config.batch_tokens // length) + self.ranks.rank * share * config.accumulate
        loss = uneven = 0.0
        with torch.compiler.set_stance("force_eager"):
            for micro in range(config.accumulate):
                if micro:
                    self.engine.step()
                one = self._micro_batch(stage, first + micro * share, share)
                loss, uneven = loss + one[0] / config.accumulate, uneven + one[1] / config.accumulate
            loss = self.ranks.mean(loss)
            if self._mixtures:
                uneven = self.ranks.mean(uneven)
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {self.step}; lower train.muon_lr and train.adam_lr")
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * config.lr_scale(self.step)
            self.engine.step()
        self.step += 1
        return loss, uneven

    def _micro_batch(self, stage: int, first: int, count: int) -> tuple[float, float]:
        """Accumulate the gradients of `count` windows."""
        device, length = self.ranks.device, self.config.contexts[stage]
        inputs, targets = (t.to(device) for t in self.windows[stage].batch(first, count))
        sequences = TiledSequences if device.type == "cpu" else WholeSequences
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            hidden = self.model(inputs, sequences(count, length, device))
            loss = sliced_cross_entropy(self.model, hidden, targets)
        balances = [mixture.balance for mixture in self._mixtures if mixture.balance is not None]
        if not balances:
            self.engine.backward(loss)
            return loss.item(), 0.0
        uneven = torch.stack(balances).sum()
        self.engine.backward(loss + (self.config.balance or 0.0) * uneven)
        return loss.item(), uneven.item() / len(balances)

    def _metrics(self, losses: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
        means = [sum(each) / len(losses) for each in zip(*losses, strict=True)]
        return {
            "train/step": self.step,
            "train/tokens": self.step * self.config.batch_tokens,
            "train/loss": means[0],
            **({"train/expert_unevenness": means[1]} if self._mixtures else {}),
            "train/lr_scale": self.config.lr_scale(self.step - 1),
            "train/tokens_per_s": len(losses) * self.config.batch_tokens / seconds,
        }


def bf16_pays(device: torch.device) -> bool:
    """Whether products in bf16 are fast there: torch computes them a hundredfold slower on CPUs without AVX-512."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _differences(found: Mapping[str, Any], mine: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """Names of the settings that differ; those that an older checkpoint does not know of are not compared."""
    for name in filter(found.__contains__, mine):
        was, value = found[name], mine[name]
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            yield from _differences(was, value, f"{inside}{name}.")
        elif was != value:
            yield inside + name


def _optimizer(model: Transformer, config: TrainConfig) -> Optimizer:
    """AdamW, without weight decay for vocabulary, norms and biases; Muon, if wanted, for the matrices in the blocks."""
    others = {id(model.embedding.weight), id(model.head.weight)}
    others |= {id(p) for module in model.modules() if isinstance(module, Norm) for p in module.parameters()}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in others]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    adam: dict[str, Any] = {"lr": config.adam_lr, "betas": (0.9, 0.95), "eps": 1e-10}
    if config.muon_lr is None:
        decayed = {"params": matrices, "weight_decay": config.weight_decay}
        return AdamW([decayed, {"params": rest, "weight_decay": 0.0}], **adam)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for parameter in model.parameters():
        setattr(parameter, "use_muon", id(parameter) in inside)  # noqa: B010
    # "standard" iterates in bf16 wherever it runs; "gram" in fp32 where a CPU has no instructions for it
    method = "standard" if bf16_pays(next(model.parameters()).device) else "gram"
    muon = {"lr": config.muon_lr, "momentum": 0.95, "weight_decay": config.weight_decay, "ns_method": method}
    groups = [
        {"params": matrices, "use_muon": True, "name": "muon", **muon},
        {"params": rest, "use_muon": False, "name": "adam", "weight_decay": 0.0, **adam},
    ]
    optimizer: Optimizer = MuonWithAuxAdam(groups)
    return optimizer
