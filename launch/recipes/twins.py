"""The recipe of the twins: the four wirings at one size, on the same text in the same order, from the same weights.

Wirings of one seed start from equal weights and see equal batches, so their results are compared in pairs. What a
killed run had finished is kept; the run it was in continues from its checkpoint.
"""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepladder.launch.json_files import kept, write_json
from stepladder.launch.recipes.bpe import END_OF_TEXT
from stepladder.launch.recipes.corpus import Corpus, standard_library
from stepladder.launch.recipes.training import (
    RecipeFromScratch,
    Words,
    held_out,
    run_with_progress,
    training_monitor,
    write_model,
)
from stepladder.launch.recipes.twins_report import publish
from stepladder.launch.where import BUNDLED
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.spec import CHOICES, ModelSpec
from stepladder.workers.text.tokenizer import read_tokenizer
from stepladder.workers.training.ranks import Ranks, training_ranks
from stepladder.workers.training.train_config import TrainConfig
from stepladder.workers.training.trainer import Trainer, text_hash


@dataclass(frozen=True, kw_only=True)
class TwinsRecipe(RecipeFromScratch):
    """Each run goes to run_dir/WIRING-SEED. tokenizer: a model directory; null for the bundled one.

    model.residual and train.seed stay as they are: `wirings` and `seeds` are in their place.

    wirings: any of standard, ladder, parallel and ladder-parallel. seeds: every wiring is trained with each.
    """

    wirings: tuple[str, ...]
    seeds: tuple[int, ...]
    tokenizer: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = CHOICES["residual"]
        if not self.wirings or set(self.wirings) - set(known) or len(set(self.wirings)) < len(self.wirings):
            raise ValueError(f"wirings is {list(self.wirings)}; it must name some of {', '.join(known)}, each once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; it must name at least one, each once")
        if self.model.residual != "standard" or self.model.ladder_layers is not None or self.train.seed:
            raise ValueError(
                "model.residual, model.ladder_layers and train.seed are set by wirings and seeds; drop them"
            )


@dataclass(frozen=True)
class Text:
    """The corpus, and its training split as tokens."""

    words: Words
    corpus: Corpus
    stream: Tensor


def run(recipe: TwinsRecipe) -> None:
    """Train what is not finished yet, seed by seed, and write run_dir/twins.json and twins.png."""
    torch.set_num_threads(recipe.threads)
    text = _text(recipe)
    with training_ranks() as ranks:
        results = [_twin(recipe, text, wiring, seed, ranks) for seed in recipe.seeds for wiring in recipe.wirings]
    if ranks.rank == 0:
        publish(results, text.corpus, Path(recipe.run_dir))


def _text(recipe: TwinsRecipe) -> Text:
    path = Path(recipe.tokenizer or BUNDLED) / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist; tokenizer must be a model directory with a tokenizer.json")
    tokenizer, corpus = read_tokenizer(path), standard_library()
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(f"{path} has no token {END_OF_TEXT}, which must end every document; use a tokenizer that has")
    if tokenizer.get_vocab_size() != recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {recipe.model.vocab_size}; {path} has {tokenizer.get_vocab_size()} words"
        )
    words = Words.of_bundled(tokenizer)
    return Text(words, corpus, words.stream(corpus.train))


def _twin(recipe: TwinsRecipe, text: Text, wiring: str, seed: int, ranks: Ranks) -> dict[str, Any]:
    """The result of one run, trained now or found finished."""
    directory = Path(recipe.run_dir) / f"{wiring}-{seed}"
    spec = replace(recipe.model, residual=wiring, eos_ids=(text.words.end,))
    config = replace(recipe.train, seed=seed)
    read = {"corpus": text.corpus.sha256, "tokens": text_hash(text.stream)}
    settings = {"model": spec.to_config(), "train": asdict(config), "text": read}
    refusal = "was made with other settings; remove its directory"
    result = ranks.share(kept(directory / "result.json", settings, refusal) if ranks.rank == 0 else None)
    if result is None:
        result = _train(recipe, text, spec, config, directory, ranks) | {"settings": settings}
        if ranks.rank == 0:
            write_json(directory / "result.json", result)
            shutil.rmtree(directory / "checkpoint")
    return result | {"directory": str(directory)}


def _train(
    recipe: TwinsRecipe, text: Text, spec: ModelSpec, config: TrainConfig, directory: Path, ranks: Ranks
) -> dict[str, Any]:
    """One run from its first weights to directory/model and its figures; rank 0 measures and writes."""
    model = Transformer(spec)
    init_weights(model, spec, config.seed)
    directory.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, text.stream, config, directory, ranks)
    result: dict[str, Any] = {"wiring": spec.residual, "seed": config.seed}
    more = {"train": asdict(config), "data_sha256": text.corpus.sha256}
    with training_monitor(recipe, directory, spec, ranks, **more) as rows:
        run_with_progress(trainer, directory.name, rows)
        if ranks.rank == 0:
            write_model(model, text.words.tokenizer, directory / "model")
            began = time.monotonic()
            bits = text.words.bits_per_byte(model, text.corpus.held_out, spec.max_position)
            measure_seconds = round(time.monotonic() - began)
            rows.log(held_out(trainer.step, bits))
    if ranks.rank == 0:
        result |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens": trainer.step * config.batch_tokens,
            "train_seconds": round(trainer.seconds),
            "measure_seconds": measure_seconds,
            "held_out_bits_per_byte": bits,
            "ranks": ranks.size,
        }
    return ranks.share(result)
