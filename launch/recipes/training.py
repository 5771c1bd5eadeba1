"""What the training recipes share: a run with its progress and figures, and text as tokens with what it costs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from stepladder.cluster.config import WANDB_MODES
from stepladder.cluster.monitor import Monitors, open_monitor
from stepladder.launch.json_files import write_json
from stepladder.launch.recipes.bpe import encode_plain, end_of_text_id, save_tokenizer
from stepladder.launch.recipes.corpus import Document
from stepladder.launch.typed_config import check_counts
from stepladder.parallel.checkpoint import load_weights, save_weights
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.text.tokenizer import read_tokenizer
from stepladder.workers.training.evaluate import bits_per_byte
from stepladder.workers.training.ranks import Ranks
from stepladder.workers.training.train_config import TrainConfig
from stepladder.workers.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TrainMonitor:
    """metrics.jsonl gets a row every train.log_every steps, and so does W&B.

    wandb: online, offline or disabled. project: of W&B.
    """

    wandb: str
    project: str

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"monitor.wandb is {self.wandb!r}; it must be one of {', '.join(WANDB_MODES)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all recipes have.

    name: of the recipe; recipe=NAME chooses it. run_dir: where everything goes; a run that was interrupted there is
    continued. threads: of torch; other numbers round differently.
    """

    name: str
    run_dir: str
    threads: int
    train: TrainConfig
    monitor: TrainMonitor

    def __post_init__(self) -> None:
        check_counts(self, "threads")


@dataclass(frozen=True, kw_only=True)
class RecipeFromScratch(Recipe):
    """model: the one that is made."""

    model: ModelSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        if (longest := max(self.train.contexts)) > self.model.max_position:
            raise ValueError(f"train.contexts has {longest}, more than model.max_position ({self.model.max_position})")


@contextmanager
def training_monitor(
    recipe: Recipe, directory: Path, spec: ModelSpec, ranks: Ranks, **more: object
) -> Iterator[Monitors]:
    """Figures of one run in `directory`, under its name; those of ranks other than 0 go nowhere.

    Beside them stand the whole recipe, the shapes of the model, and `more` in place of what the recipe says.
    """
    shown = asdict(recipe) | more
    shown["model"] = shown.get("model", {}) | asdict(spec) | {"dtype": str(spec.dtype)}
    monitor, rows = recipe.monitor, Monitors()
    if ranks.rank == 0:
        rows = open_monitor(directory, monitor.wandb, monitor.project, directory.name, shown)
    try:
        yield rows
    finally:
        rows.close()


def run_with_progress(
    trainer: Trainer, name: str, rows: Monitors, after: Callable[[int], None] = lambda step: None
) -> None:
    """All remaining steps, under a progress bar, and the trainer's end.

    Args:
        rows: where figures go.
        after: called on every rank with the number of steps done, before the first step and after each.
    """
    lead = trainer.ranks.rank == 0
    bar = tqdm(total=trainer.config.steps, initial=trainer.step, unit="step", desc=name, disable=not lead)

    def log(row: dict[str, Any]) -> None:
        rows.log(row)
        bar.set_postfix(loss=f"{row['train/loss']:.3f}", refresh=False)

    try:
        after(trainer.step)
        for step in trainer.run(log):
            bar.update()
            after(step)
    finally:
        bar.close()
    trainer.save()
    trainer.close()


def held_out(step: int, cost: float, of: str = "bits_per_byte") -> dict[str, Any]:
    """A row of figures: bits per byte of held-out text after so many steps."""
    return {"train/step": step, f"held_out/{of}": cost}


def write_model(model: Transformer, tokenizer: Tokenizer, directory: Path) -> None:
    """A Hugging Face directory in bf16; `model` then has the weights that were written."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, directory, model.spec.max_position)
    write_json(directory / "config.json", model.spec.to_config())
    save_weights(model, directory, torch.bfloat16)
    load_weights(model, directory)


@dataclass(frozen=True)
class Words:
    """A tokenizer, and the tokens around a document: `start` before it, `end` after it."""

    tokenizer: Tokenizer
    start: tuple[int, ...]
    end: int

    @classmethod
    def of_bundled(cls, tokenizer: Tokenizer) -> "Words":
        """Of a tokenizer that `launch.bpe` made."""
        return cls(tokenizer, (), end_of_text_id(tokenizer))

    @classmethod
    def of_model(cls, directory: Path, eos_ids: Sequence[int]) -> "Words":
        """Of a model directory: what its tokenizer puts before a text, and the model's first end-of-sequence token.

        Raises:
            ValueError: no tokenizer, or no end-of-sequence token.
        """
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{path} does not exist; the model directory must have a tokenizer.json")
        if not eos_ids:
            raise ValueError(f"{directory / 'config.json'} has no eos_token_id, which must end every document; add it")
        tokenizer = read_tokenizer(path)
        ids, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        return cls(tokenizer, tuple(ids[: ids.index(plain[0])]), eos_ids[0])

    def encode(self, document: Document) -> list[int]:
        return [*self.start, *encode_plain(self.tokenizer, document.text), self.end]

    def stream(self, documents: Sequence[Document]) -> Tensor:
        """The documents one after the other: int32 [tokens]. As a list they would take nine times the memory."""
        ids = (number for document in documents for number in self.encode(document))
        return torch.from_numpy(np.fromiter(ids, np.int32))

    def bits_per_byte(self, model: Transformer, documents: Sequence[Document], context: int) -> float:
        """Bits per byte of `documents` in windows of `context` tokens."""
        return bits_per_byte(model, self.alone(documents), size(documents), context)

    def alone(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of each document by itself: after a start or else an end, and before an end."""
        before = () if self.start else (self.end,)
        return [[*before, *self.encode(document)] for document in documents]


def size(documents: Sequence[Document]) -> int:
    """Bytes in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)
