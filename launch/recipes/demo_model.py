"""The recipe of the bundled models: text, tokenizer, weights and figures, all from one Python installation."""

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from stepladder.launch.json_files import write_json
from stepladder.launch.recipes.bpe import end_of_text_id, train_tokenizer
from stepladder.launch.recipes.corpus import Corpus, primed_xz_bits_per_byte, standard_library
from stepladder.launch.recipes.training import (
    RecipeFromScratch,
    Words,
    held_out,
    run_with_progress,
    size,
    training_monitor,
    write_model,
)
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.training.ranks import Ranks, training_ranks
from stepladder.workers.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class DemoRecipe(RecipeFromScratch):
    """The model goes to run_dir/model. evaluate: a model directory to measure instead."""

    evaluate: str | None


def run(recipe: DemoRecipe) -> None:
    """Train and write run_dir/model, or measure the directory `evaluate`; both print what they found as JSON."""
    torch.set_num_threads(recipe.threads)
    corpus = standard_library()
    if recipe.evaluate:
        print(json.dumps(measure(Path(recipe.evaluate), corpus), indent=2))
        return
    directory = Path(recipe.run_dir) / "model"
    with training_ranks() as ranks:
        figures = train(recipe, corpus, directory, ranks)
    if ranks.rank == 0:
        write_json(directory / "training.json", figures)
        print(f"{json.dumps(figures, indent=2)}\nwritten to {directory}")


def train(recipe: DemoRecipe, corpus: Corpus, directory: Path, ranks: Ranks) -> dict[str, Any]:
    """Make tokenizer and weights; rank 0 writes and measures them. Returns the figures of the run."""
    learned = None
    if ranks.rank == 0:
        learned = train_tokenizer((document.text for document in corpus.train), recipe.model.vocab_size).to_str()
    tokenizer = Tokenizer.from_str(ranks.share(learned))
    spec = replace(recipe.model, eos_ids=(end_of_text_id(tokenizer),))
    model = Transformer(spec)
    init_weights(model, spec, recipe.train.seed)
    stream = Words.of_bundled(tokenizer).stream(corpus.train)
    run_dir, measured = Path(recipe.run_dir), dict[str, Any]()
    trainer = Trainer(model, stream, recipe.train, run_dir, ranks)
    with training_monitor(recipe, run_dir, spec, ranks, data_sha256=corpus.sha256) as rows:
        run_with_progress(trainer, recipe.name, rows)
        if ranks.rank == 0:
            write_model(model, tokenizer, directory)
            measured = measure(directory, corpus)
            rows.log(held_out(trainer.step, measured["held_out_bits_per_byte"]))
    return measured | {
        "recipe": recipe.name,
        "seed": recipe.train.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": trainer.step * recipe.train.batch_tokens,
        "tokens_of_text": len(stream),
        "train_seconds": round(trainer.seconds),
        "torch": torch.__version__,
    }


def measure(directory: Path, corpus: Corpus) -> dict[str, Any]:
    """Held-out bits per byte of the model in `directory` (its bf16 weights, computed in fp32) and of primed xz; of a
    mixture of experts how many tokens the least used expert of any layer got, as a share of what is fair."""
    spec = ModelSpec.load(directory)
    model = Transformer(spec)
    load_weights(model, directory)
    words = Words.of_bundled(Tokenizer.from_file(str(directory / "tokenizer.json")))
    text = corpus.held_out
    bits = words.bits_per_byte(model, text, spec.max_position)
    loads = [module.load for module in model.modules() if isinstance(module, MixtureOfExperts)]
    least = min((float(load.min() / load.double().mean()) for load in loads), default=None)
    return {
        "python": platform.python_version(),
        "data_sha256": corpus.sha256,
        "train_bytes": size(corpus.train),
        "held_out_bytes": size(text),
        "held_out_documents": len(text),
        "held_out_bits_per_byte": round(bits, 4),
        "primed_xz_bits_per_byte": round(primed_xz_bits_per_byte(corpus.train, text), 4),
    } | ({} if least is None else {"least_used_expert": round(least, 3)})
