"""The bundled models are what their card says, and the recipe refuses what it cannot do."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from stepladder.launch.recipes.corpus import primed_xz_bits_per_byte, standard_library
from stepladder.launch.recipes.demo_model import DemoRecipe, run
from stepladder.launch.recipes.training import Words
from stepladder.launch.train import recipe_of
from stepladder.parallel.checkpoint import load_weights, save_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.heads import heads_of
from stepladder.parallel.model import Transformer
from stepladder.parallel.moe import MixtureOfExperts
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from tests.composed import composed

DEMO = Path(__file__).parents[2] / "launch" / "demo_model"
MOE = DEMO.with_name("demo_moe")
both = pytest.mark.parametrize("directory", [DEMO, MOE], ids=lambda path: path.name)


def recipe(*overrides: str) -> DemoRecipe:
    return recipe_of(composed("train", *overrides))[0]


@both
def test_the_bundled_model_beats_primed_xz_on_held_out_documents(directory: Path) -> None:
    """And every expert of a mixture is used."""
    corpus = standard_library()
    sample = [d for d in corpus.held_out if 1_000 <= len(d.text) <= 6_000]
    assert len(sample) >= 6
    model = Transformer(ModelSpec.load(directory))
    load_weights(model, directory)
    words = Words.of_bundled(Tokenizer.from_file(str(directory / "tokenizer.json")))
    assert words.bits_per_byte(model, sample, 1024) < primed_xz_bits_per_byte(corpus.train, sample)
    loads = [module.load for module in model.modules() if isinstance(module, MixtureOfExperts)]
    assert len(loads) == (4 if directory == MOE else 0)
    assert all(float(load.min()) >= 0.25 * float(load.double().mean()) for load in loads)


@both
def test_the_bundled_model_is_a_ladder_that_four_ranks_can_share(directory: Path) -> None:
    spec = ModelSpec.load(directory)
    assert all(spec.is_ladder(layer) for layer in range(spec.num_layers))
    for ranks in (1, 2, 4):
        assert Transformer(spec, Shard(0, ranks)).num_kv_heads == len(heads_of(spec, Shard(0, ranks)).kv)
    assert sum(path.stat().st_size for path in directory.iterdir()) < 12e6
    assert AutoConfig.from_pretrained(directory, trust_remote_code=True).num_hidden_layers == spec.num_layers


@both
def test_transformers_computes_the_bundled_model_with_its_code(directory: Path) -> None:
    spec, tokens = ModelSpec.load(directory), torch.arange(40) * 7
    model = Transformer(spec).requires_grad_(False)
    load_weights(model, directory)
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        want = theirs(tokens[None]).logits[0]
        got = model.logits(model(tokens, WholeSequences(1, 40)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)


@both
def test_the_bundled_model_lies_there_as_we_write_it(directory: Path, tmp_path: Path) -> None:
    spec = ModelSpec.load(directory)
    assert json.loads((directory / "config.json").read_text()) == spec.to_config()
    save_weights(Transformer(spec), tmp_path, torch.bfloat16)
    code = "modeling_stepladder.py"
    assert (directory / code).read_text() == (tmp_path / code).read_text()


@both
def test_training_json_says_what_was_measured(directory: Path) -> None:
    figures = json.loads((directory / "training.json").read_text())
    assert figures["held_out_bits_per_byte"] < figures["primed_xz_bits_per_byte"]
    made = recipe("run_dir=/r", f"recipe={figures['recipe']}")
    assert figures["tokens_seen"] == made.train.steps * made.train.batch_tokens
    assert ("least_used_expert" in figures) == (made.model.experts is not None) == (directory == MOE)


def test_both_bundled_models_have_the_same_words() -> None:
    assert (MOE / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.contexts=[256,2048]", "train.contexts has 2048, more than model.max_position (1024)"),
        ("train.batch_tokens=1000", "train.contexts has 256; it must divide train.batch_tokens (1000)"),
        ("train.warmup=0.5", "train.warmup and train.decay are shares of the run"),
        ("train.precision=fp8", "train.precision is 'fp8'; it must be bf16 or fp32"),
        ("train.tokens=many", "train.tokens is 'many': expected `int`"),
        ("+train.momentum=1", "train.momentum is not an option"),
        ("model.residual=laddr", "residual is 'laddr'; it must be one of"),
        ("monitor.wandb=on", "monitor.wandb is"),
        ("threads=0", "threads is 0; it must be at least 1"),
        ("name=twinz", "name is 'twinz'; the recipes are"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe("run_dir=/r", override)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_recipe_writes_a_model_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of four small steps over a tenth of the library, from configuration to training.json."""
    whole = standard_library()
    small = type(whole)(whole.train[::10], whole.held_out[:3])
    monkeypatch.setattr("stepladder.launch.recipes.demo_model.standard_library", lambda: small)
    shape = ["model.vocab_size=400", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=32"]
    size = ["model.num_layers=2", "train.tokens=2048", "train.batch_tokens=512", "train.contexts=[64,128]"]
    run(recipe(f"run_dir={tmp_path}", "train.log_every=2", *shape, *size))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows if "train/loss" in row] == [2, 4]
    figures = json.loads((tmp_path / "model" / "training.json").read_text())
    assert (rows[-1]["train/step"], rows[-1]["held_out/bits_per_byte"]) == (4, figures["held_out_bits_per_byte"])
    assert figures["data_sha256"] == small.sha256
    assert 1 < figures["held_out_bits_per_byte"] < 8
    model = Transformer(ModelSpec.load(tmp_path / "model"))
    load_weights(model, tmp_path / "model")
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
