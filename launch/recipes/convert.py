"""The recipe that turns layers of a standard checkpoint to ladder and trains it on until it is as good as before.

Zhang et al. 2501.06589 §4 do this to Llama-3.1-8B-Instruct: half of the layers, 3 billion tokens.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepladder.cluster.monitor import Monitors
from stepladder.kernels.once import CACHE
from stepladder.launch.json_files import kept, write_json
from stepladder.launch.recipes.convert_report import BEFORE, WRITTEN, publish
from stepladder.launch.recipes.corpus import Corpus, Document, standard_library
from stepladder.launch.recipes.documents import given_text
from stepladder.launch.recipes.training import Recipe, Words, held_out, run_with_progress, size, training_monitor
from stepladder.launch.typed_config import check_counts
from stepladder.parallel.checkpoint import fingerprints, load_weights, save_weights
from stepladder.parallel.families import identity
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.typed_json import read_object
from stepladder.workers.source.resolve import resolve
from stepladder.workers.training.ranks import Ranks, training_ranks
from stepladder.workers.training.trainer import Trainer

CONVERTED = {
    "standard": "ladder",
    "parallel": "ladder-parallel",
    "ladder": "ladder",
    "ladder-parallel": "ladder-parallel",
}
KEPT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
        "additional_chat_templates/*",
        "generation_config.json", "LICENSE*")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is converted.

    Attributes:
        path: a Hugging Face directory, a GGUF file, or the name of a packaged model.
        cache: folder for what the latter two become.
    """

    path: str
    cache: str = CACHE


@dataclass(frozen=True, kw_only=True)
class ConvertRecipe(Recipe):
    """The model goes to run_dir/model.

    ladder_layers: the last so many layers, or a list of them. data: files and directories of text; none for Python's
    standard library. text_field: of a JSON line. held_out: text to measure on; null sets some of `data` apart.
    held_out_bytes: measure on about so much of it; null for all. measure_every: steps. tolerance: how far above its
    cost of before the model may stay to count as recovered.
    """

    model: Source
    ladder_layers: int | tuple[int, ...]
    data: tuple[str, ...]
    text_field: str
    held_out: tuple[str, ...] | None
    held_out_bytes: int | None
    measure_every: int
    tolerance: float

    def __post_init__(self) -> None:
        check_counts(self, "threads", "measure_every", "held_out_bytes")
        if self.tolerance < 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must not be negative")
        if self.held_out is not None and not self.data:
            raise ValueError("held_out needs data: the standard library brings its own held-out text")


def run(recipe: ConvertRecipe) -> None:
    """Convert, train and measure; writes run_dir/model, convert.json and convert.png."""
    torch.set_num_threads(recipe.threads)
    source = Path(resolve(recipe.model.path, cache=recipe.model.cache, fetching=True, progress=True))
    directory = Path(recipe.run_dir)
    before = ModelSpec.load(source)
    after = converted(before, recipe.ladder_layers)
    context = max(recipe.train.contexts)
    if context > before.max_position:
        raise ValueError(f"train.contexts has {context}, more than the model's {before.max_position} positions")
    words = Words.of_model(source, before.eos_ids)
    corpus = given_text(recipe.data, recipe.held_out, recipe.text_field) if recipe.data else standard_library()
    measured = some(corpus.held_out, recipe.held_out_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    settings = _settings(recipe, source, corpus, measured)
    with training_ranks() as ranks:
        costs = Costs(directory / "measured.json", settings, words, measured, context, ranks)
        with training_monitor(recipe, directory, after, ranks, text=corpus.sha256) as rows:
            if BEFORE not in costs.known:
                rows.log(held_out(0, costs.measure(BEFORE, _load(source, before)), "bits_per_byte_before"))
            model = _load(source, after)
            _train(recipe, model, words, corpus, costs, ranks, rows)
            if ranks.rank == 0:
                write_model(model, after, source, directory / "model")
                load_weights(model, directory / "model")  # rounded to the checkpoint's dtype: what others will load
            rows.log(held_out(recipe.train.steps, costs.measure(WRITTEN, model), "bits_per_byte_written"))
    if ranks.rank == 0:
        publish(costs.known, recipe.train.batch_tokens, recipe.tolerance, directory)


def converted(spec: ModelSpec, layers: int | Sequence[int]) -> ModelSpec:
    """`spec` with these layers turned to ladder: the last so many, or the ones that are named.

    Raises:
        ValueError: no layer, one that does not exist, or one that is ladder already.
    """
    total = spec.num_layers
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"ladder_layers is {layers}; the model has {total} layers, so it must be 1 to {total}")
        layers = range(total - layers, total)
    if not layers or not all(0 <= layer < total for layer in layers):
        raise ValueError(f"ladder_layers is {list(layers)}; it must name some of the layers 0 to {total - 1}")
    already = {layer for layer in range(total) if spec.is_ladder(layer)}
    if already & set(layers):
        raise ValueError(f"layer {min(already & set(layers))} of the checkpoint is ladder already; choose other layers")
    ladder = tuple(sorted(already | set(layers)))
    return replace(spec, residual=CONVERTED[spec.residual], ladder_layers=ladder)


def some(documents: Sequence[Document], num_bytes: int | None) -> tuple[Document, ...]:
    """The first documents by a hash of their names that together have `num_bytes` bytes; all for None."""
    chosen: list[Document] = []
    for document in sorted(documents, key=lambda d: d.hash):
        if num_bytes is not None and size(chosen) >= num_bytes:
            break
        chosen.append(document)
    return tuple(chosen)


class Costs:
    """Bits per byte at BEFORE, after so many steps and of what was WRITTEN, kept in a file for a resumed run."""

    def __init__(
        self, path: Path, settings: dict[str, Any], words: Words, text: Sequence[Document], context: int, ranks: Ranks
    ) -> None:
        self.path, self.settings, self.words, self.text = path, settings, words, text
        self.context, self.ranks = context, ranks
        refusal = "was written with other settings; remove it"
        found = ranks.share(kept(path, settings, refusal) if ranks.rank == 0 else None)
        self.known: dict[str, float] = found["bits_per_byte"] if found else {}

    def measure(self, key: str, model: Transformer) -> float:
        """Rank 0 measures, all ranks know."""
        model = model.to(self.ranks.device)
        cost = self.words.bits_per_byte(model, self.text, self.context) if self.ranks.rank == 0 else None
        self.known[key] = self.ranks.share(cost)
        if self.ranks.rank == 0:
            write_json(self.path, {"settings": self.settings, "bits_per_byte": self.known})
        return self.known[key]


def _settings(recipe: ConvertRecipe, source: Path, corpus: Corpus, measured: Sequence[Document]) -> dict[str, Any]:
    """What the costs depend on."""
    return {
        "checkpoint": fingerprints(source),
        "ladder_layers": recipe.ladder_layers,
        "text": corpus.sha256,
        "measured_bytes": size(measured),
        "train": asdict(recipe.train),
    }


def _load(directory: Path, spec: ModelSpec) -> Transformer:
    """In fp32, whatever the checkpoint is in."""
    model = Transformer(replace(spec, dtype=torch.float32))
    load_weights(model, directory)
    return model


def _train(
    recipe: ConvertRecipe,
    model: Transformer,
    words: Words,
    corpus: Corpus,
    costs: Costs,
    ranks: Ranks,
    rows: Monitors,
) -> None:
    trainer = Trainer(model, words.stream(corpus.train), recipe.train, Path(recipe.run_dir), ranks)

    def after(step: int) -> None:
        wanted = step % recipe.measure_every == 0 or step == recipe.train.steps
        if wanted and str(step) not in costs.known:
            rows.log(held_out(step, costs.measure(str(step), model)))

    run_with_progress(trainer, recipe.name, rows, after)


def write_model(model: Transformer, spec: ModelSpec, source: Path, directory: Path) -> None:
    """A Hugging Face directory: the source's configuration with the new wiring and a name of ours, its tokenizer, the
    model's weights."""
    directory.mkdir(parents=True, exist_ok=True)
    assert spec.ladder_layers is not None
    config = read_object(source / "config.json") | identity(spec.family, spec.residual)
    config |= {"residual": spec.residual, "ladder_layers": list(spec.ladder_layers)}
    for pattern in KEPT:
        for path in filter(Path.is_file, source.glob(pattern)):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    write_json(directory / "config.json", config)
    save_weights(model, directory, spec.dtype)
    assert ModelSpec.load(directory) == spec
