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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import Norm
from stepladder.parallel.rendezvous import open_store
from stepladder.workers.training.sliced_loss import sliced_cross_entropy
from stepladder.workers.training.stacked import put_together, take_apart
from stepladder.workers.training.text_windows import TextWindows
from stepladder.workers.training.train_config import TrainConfig
from stepladder.workers.training.training_context import TiledSequences

Log = Callable[[dict[str, Any]], None]
BUCKET = 5_000_000  # elements reduced at a time
MODEL_STATES = "mp_rank_00_model_states.pt"  # DeepSpeed's name for the weights and what was saved beside them


class Ranks(NamedTuple):
    """The data-parallel ranks that train together; see `training_ranks`."""

    rank: int
    size: int
    device: torch.device

    def mean(self, value: float) -> float:
        """Over the ranks; each gives its own."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; all wait for it."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def training_ranks() -> Iterator[Ranks]:
    """Join the ranks that `torchrun` started, or be the only one: NCCL on CUDA, gloo on CPU.

    DeepSpeed needs torch's default group and the rank in the environment. A lone rank meets itself at a free port.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed reads it once, when it is imported
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=open_store("127.0.0.1"), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        _leave()


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
        ValueError: the checkpoint found there is of other `settings`.
    """

    def __init__(self, model: Transformer, stream: Tensor, config: TrainConfig, directory: Path, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model.to(ranks.device).train(), config, ranks
        self.directory = directory / "checkpoint"
        for stage in range(len(config.contexts)):
            config.share(stage, ranks.size)
        self.windows = [TextWindows(stream, length, config.seed) for length in config.contexts]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self._taken = take_apart(model) if config.muon_lr is not None else []
        self.optimizer = _optimizer(model, config)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.engine = _engine(model, self.optimizer, config, ranks)
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
        losses, seconds = [], 0.0  # of steps alone: not of checkpoints, nor of what the caller does between two steps
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
        self.engine.save_checkpoint(str(self.directory), tag=tag, client_state={"training": state}, save_latest=False)
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
        states = torch.load(self.directory / tag / MODEL_STATES, map_location="cpu", mmap=True, weights_only=False)
        state = states["training"]
        if others := ", ".join(_differences(state, self.settings)).replace("config.", "train."):
            raise ValueError(
                f"{self.directory} was written with other settings ({others}); remove it or choose another run_dir"
            )
        self.engine.load_checkpoint(str(self.directory), tag=tag)
        self.step, self.seconds = state["step"], state["seconds"]
        self._saved = self.step

    def _train_step(self) -> float:
        """One optimiser step: mean loss in nats per token."""
        config, (stage, first_step) = self.config, self.config.stage(self.step)
        length, share = config.contexts[stage], config.share(stage, self.ranks.size)
        first = (self.step - first_step) * (config.batch_tokens // length) + self.ranks.rank * share * config.accumulate
        loss = 0.0
        with torch.compiler.set_stance("force_eager"):
            for micro in range(config.accumulate):
                if micro:
                    self.engine.step()  # DeepSpeed counts micro-batches in it; the last one's is the optimiser's step
                loss += self._micro_batch(stage, first + micro * share, share) / config.accumulate
            loss = self.ranks.mean(loss)
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {self.step}; lower train.muon_lr and train.adam_lr")
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * config.lr_scale(self.step)
            self.engine.step()
        self.step += 1
        return loss

    def _micro_batch(self, stage: int, first: int, count: int) -> float:
        """Accumulate the gradients of `count` windows."""
        device, length = self.ranks.device, self.config.contexts[stage]
        inputs, targets = (t.to(device) for t in self.windows[stage].batch(first, count))
        sequences = TiledSequences if device.type == "cpu" else WholeSequences
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            hidden = self.model(inputs, sequences(count, length, device))
            loss = sliced_cross_entropy(self.model, hidden, targets)
        self.engine.backward(loss)
        return loss.item()

    def _metrics(self, losses: list[float], seconds: float) -> dict[str, Any]:
        return {
            "train/step": self.step,
            "train/tokens": self.step * self.config.batch_tokens,
            "train/loss": sum(losses) / len(losses),
            "train/lr_scale": self.config.lr_scale(self.step - 1),
            "train/tokens_per_s": len(losses) * self.config.batch_tokens / seconds,
        }


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
    muon = {"lr": config.muon_lr, "momentum": 0.95, "weight_decay": config.weight_decay, "ns_method": "standard"}
    groups = [
        {"params": matrices, "use_muon": True, "name": "muon", **muon},
        {"params": rest, "use_muon": False, "name": "adam", "weight_decay": 0.0, **adam},
    ]
    optimizer: Optimizer = MuonWithAuxAdam(groups)
    return optimizer


def _engine(model: Transformer, optimizer: Optimizer, config: TrainConfig, ranks: Ranks) -> Any:
    """DeepSpeed around the model: ZeRO-1 in fp32. TextWindows are its samples."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On CPU DeepSpeed would compile a C++ all-reduce for inference, for two minutes; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": config.share(0, ranks.size),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip or 0.0,
        "steps_per_print": 10**12,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": ranks.device.type == "cuda",
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def _leave() -> None:
    """Leave the default group, which DeepSpeed knows by a name of its own once an engine has been made."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()
