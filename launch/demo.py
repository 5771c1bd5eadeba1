"""The recipe of the bundled model: text, tokenizer, weights and figures, all from one Python installation."""

import json
import platform
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from cluster.config import WANDB_MODES
from cluster.monitor import open_monitor
from launch.bpe import encode_plain, end_of_text_id, save_tokenizer, train_tokenizer
from launch.corpus import Corpus, Document, primed_xz_bits_per_byte, standard_library
from parallel.checkpoint import load_weights, save_weights
from parallel.model import Transformer
from parallel.modules import init_weights
from parallel.spec import ModelSpec
from workers.evaluate import bits_per_byte
from workers.trainer import TrainConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class TrainMonitor:
    """metrics.jsonl gets a row every train.log_every steps, and so does W&B unless it is disabled."""

    wandb: str
    project: str

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"monitor.wandb is {self.wandb!r}; it must be one of {', '.join(WANDB_MODES)}")


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """run_dir: absolute; the model goes to run_dir/model. evaluate: a model directory to measure instead."""

    name: str
    run_dir: str
    threads: int
    evaluate: str | None
    model: ModelSpec
    train: TrainConfig
    monitor: TrainMonitor

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        if max(self.train.contexts) > self.model.max_position:
            longest = max(self.train.contexts)
            raise ValueError(f"train.contexts has {longest}, more than model.max_position ({self.model.max_position})")


def run(recipe: DemoRecipe) -> None:
    """Train and write run_dir/model, or measure the directory `evaluate`; both print what they found as JSON."""
    torch.set_num_threads(recipe.threads)
    corpus = standard_library()
    if recipe.evaluate:
        print(json.dumps(measure(Path(recipe.evaluate), corpus), indent=2))
        return
    directory = Path(recipe.run_dir) / "model"
    directory.mkdir(parents=True, exist_ok=True)
    figures = train(recipe, corpus, directory) | measure(directory, corpus)
    text = json.dumps(figures, indent=2)
    (directory / "training.json").write_text(text + "\n")
    print(f"{text}\nwritten to {directory}")


def train(recipe: DemoRecipe, corpus: Corpus, directory: Path) -> dict[str, Any]:
    """Make tokenizer and weights and write them to `directory`; returns the figures of the run."""
    tokenizer = train_tokenizer((document.text for document in corpus.train), recipe.model.vocab_size)
    end = end_of_text_id(tokenizer)
    spec = replace(recipe.model, eos_ids=(end,))
    save_tokenizer(tokenizer, directory, spec.max_position)
    model = Transformer(spec)
    init_weights(model, spec, recipe.train.seed)
    stream = token_stream(tokenizer, corpus.train)
    trainer = Trainer(model, stream, recipe.train, Path(recipe.run_dir))
    run_with_progress(trainer, recipe)
    (directory / "config.json").write_text(json.dumps(spec.to_config(), indent=2) + "\n")
    save_weights(model, directory, torch.bfloat16)
    return {
        "recipe": recipe.name,
        "seed": recipe.train.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": trainer.step * recipe.train.batch_tokens,
        "tokens_of_text": len(stream),
        "train_seconds": round(trainer.seconds),
        "torch": torch.__version__,
    }


def run_with_progress(trainer: Trainer, recipe: DemoRecipe) -> None:
    """All remaining steps, under a progress bar and with the recipe's monitor."""
    shown = {"train": asdict(recipe.train), "model": recipe.model.to_config()}
    monitor = open_monitor(Path(recipe.run_dir), recipe.monitor.wandb, recipe.monitor.project, recipe.name, shown)
    with closing(monitor), tqdm(total=trainer.config.steps, initial=trainer.step, unit="step") as bar:

        def log(row: dict[str, Any]) -> None:
            monitor.log(row)
            bar.set_postfix(loss=f"{row['train/loss']:.3f}", refresh=False)

        for _ in trainer.run(log):
            bar.update()
    trainer.save()


def measure(directory: Path, corpus: Corpus) -> dict[str, Any]:
    """Held-out bits per byte of the model in `directory` (its bf16 weights, computed in fp32) and of primed xz."""
    spec = ModelSpec.load(directory)
    model = Transformer(spec)
    load_weights(model, directory)
    held_out = corpus.held_out
    return {
        "python": platform.python_version(),
        "data_sha256": corpus.sha256,
        "train_bytes": size(corpus.train),
        "held_out_bytes": size(held_out),
        "held_out_documents": len(held_out),
        "held_out_bits_per_byte": round(model_bits_per_byte(model, directory, held_out), 4),
        "primed_xz_bits_per_byte": round(primed_xz_bits_per_byte(corpus.train, held_out), 4),
    }


def model_bits_per_byte(model: Transformer, directory: Path, documents: Sequence[Document]) -> float:
    """Bits per byte of `documents` with the tokenizer in `directory`, in windows of the model's context."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = end_of_text_id(tokenizer)
    ids = [[end, *encode_plain(tokenizer, document.text), end] for document in documents]
    return bits_per_byte(model, ids, size(documents), model.spec.max_position)


def token_stream(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tensor:
    """The documents one after the other, each followed by the end-of-text token: int32 [tokens]."""
    end = end_of_text_id(tokenizer)
    return torch.tensor([i for d in documents for i in (*encode_plain(tokenizer, d.text), end)], dtype=torch.int32)


def size(documents: Sequence[Document]) -> int:
    """Bytes in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)
