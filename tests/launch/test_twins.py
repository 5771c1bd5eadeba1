"""The twins, trained for a few steps for real: equal starts, kept results, a report that says what was measured."""

import json
from pathlib import Path

import pytest
import torch

import stepladder.launch.recipes.twins
from stepladder import LLM, SamplingParams
from stepladder.launch.recipes.corpus import Corpus, standard_library
from stepladder.launch.recipes.twins import TwinsRecipe, run
from stepladder.launch.recipes.twins_report import losses, report_of
from stepladder.launch.train import recipe_of
from stepladder.parallel.spec import ModelSpec
from tests.composed import composed
from tests.tokenizers_of import write_byte_level

SMALL = [
    "model.hidden_size=32",
    "model.head_dim=8",
    "model.intermediate_size=32",
    "model.num_layers=2",
    "model.max_position=128",
    "train.tokens=1024",
    "train.batch_tokens=256",
    "train.contexts=[64]",
    "train.log_every=1",
    "train.checkpoint_every=2",
]


def recipe(*overrides: str) -> TwinsRecipe:
    return recipe_of(composed("train", "recipe=twins", *overrides))[0]


@pytest.fixture(scope="module")
def text() -> Corpus:
    whole = standard_library()
    return Corpus(whole.train[::40], tuple(sorted(whole.held_out, key=lambda d: len(d.text))[4:8]))


@pytest.fixture
def small_text(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr("stepladder.launch.recipes.twins.standard_library", lambda: text)
    return text


def test_four_wirings_two_seeds_from_configuration_to_report(
    tmp_path: Path, small_text: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "recipe=twins"])
    twins = recipe(f"run_dir={tmp_path}", "seeds=[0,1]", *SMALL)
    run(twins)
    report = json.loads((tmp_path / "twins.json").read_text())
    assert report["suite"] == "twins" and report["command"] == "python -m launch.train recipe=twins"
    assert [(r["wiring"], r["seed"]) for r in report["runs"]] == [(w, s) for s in (0, 1) for w in twins.wirings]
    assert len({r["held_out_bits_per_byte"] for r in report["runs"]}) == 8
    assert set(report["summary"]) == {"worst standard run, bits per byte"} | {
        f"{w} over standard, mean of the seeds" for w in twins.wirings[1:]
    }
    assert (tmp_path / "twins.png").stat().st_size > 10_000
    assert "worst standard run" in capsys.readouterr().out
    first = [losses(tmp_path / f"{wiring}-1")[256] for wiring in twins.wirings]
    assert max(first) - min(first) < 0.05  # the same weights on the same batch, before the wirings matter much

    def train_again(*args: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("stepladder.launch.recipes.twins._train", train_again)
    (tmp_path / "ladder-1" / "metrics.jsonl").unlink()
    run(twins)  # finds everything finished, and draws what there is
    with pytest.raises(ValueError, match=r"result\.json was made with other settings"):
        run(recipe(f"run_dir={tmp_path}", "seeds=[0,1]", *SMALL, "train.adam_lr=0.001"))
    shorter = Corpus(small_text.train[:-1], small_text.held_out)
    monkeypatch.setattr("stepladder.launch.recipes.twins.standard_library", lambda: shorter)
    with pytest.raises(ValueError, match=r"result\.json was made with other settings"):
        run(twins)


def test_a_killed_run_continues_and_the_model_can_be_served(
    tmp_path: Path, small_text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second wiring's third step: the first is kept, the second ends as if nothing had happened."""
    options = [*SMALL, "seeds=[3]", "wirings=[standard,ladder]"]
    run(recipe(f"run_dir={tmp_path / 'whole'}", *options))

    class Killed(BaseException):
        pass

    def train_and_die(trainer: stepladder.launch.recipes.twins.Trainer, *rest: object) -> None:
        if trainer.model.spec.residual == "ladder":
            for step in trainer.run(lambda row: None):
                if step == 3:
                    raise Killed
        whole(trainer, *rest)

    whole = stepladder.launch.recipes.twins.run_with_progress
    monkeypatch.setattr("stepladder.launch.recipes.twins.run_with_progress", train_and_die)
    with pytest.raises(Killed):
        run(recipe(f"run_dir={tmp_path / 'killed'}", *options))
    monkeypatch.setattr("stepladder.launch.recipes.twins.run_with_progress", whole)
    assert (tmp_path / "killed" / "ladder-3" / "checkpoint" / "latest").read_text() == "step2"
    run(recipe(f"run_dir={tmp_path / 'killed'}", *options))
    for wiring in ("standard", "ladder"):
        files = [tmp_path / name / f"{wiring}-3" / "model" / "model.safetensors" for name in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    model = tmp_path / "whole" / "ladder-3" / "model"
    assert ModelSpec.load(model).residual == "ladder"
    (done,) = LLM(str(model)).generate(["def f("], SamplingParams(max_tokens=4, temperature=0.0))
    assert done.text


def test_the_report_pairs_each_run_with_the_standard_run_of_its_seed() -> None:
    costs = {("standard", 0): 1.0, ("standard", 1): 1.2, ("ladder", 0): 1.01, ("ladder", 1): 1.26}
    results = [{"wiring": w, "seed": s, "held_out_bits_per_byte": cost} for (w, s), cost in costs.items()]
    report = report_of(results, primed_xz=1.15)
    rows = {(row.case, row.metric): row.value for row in report.rows}
    assert rows["ladder", "ratio to standard, mean"] == pytest.approx((1.01 + 1.05) / 2)
    assert rows["ladder", "ratio to standard, most"] == pytest.approx(1.05)
    assert rows["standard", "held-out cost, standard deviation"] == pytest.approx(0.1 * 2**0.5)
    assert not report.summary["worst standard run, bits per byte"].holds
    assert not report.summary["ladder over standard, mean of the seeds"].holds


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("wirings=[standard,laddr]", "it must name some of standard, ladder, parallel, ladder-parallel, each once"),
        ("seeds=[1,1]", "seeds is [1, 1]; it must name at least one, each once"),
        ("+model.residual=ladder", "are set by wirings and seeds; drop them"),
        ("train.seed=4", "are set by wirings and seeds; drop them"),
        ("model.max_position=64", "more than model.max_position (64)"),
        ("threads=0", "threads is 0; it must be at least 1"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe("run_dir=/r", override)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, small_text: Corpus) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is 4000; .*tokenizer\.json has 4096 words"):
        run(recipe(f"run_dir={tmp_path}", "model.vocab_size=4000"))
    write_byte_level(tmp_path)
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>, which must end every document"):
        run(recipe(f"run_dir={tmp_path}", f"tokenizer={tmp_path}"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer must be a model directory"):
        run(recipe(f"run_dir={tmp_path}", f"tokenizer={tmp_path}"))


def test_the_twins_start_from_equal_weights() -> None:
    states = []
    for wiring in ("standard", "ladder", "parallel", "ladder-parallel"):
        spec = ModelSpec(**{**vars(recipe("run_dir=/r", *SMALL).model), "residual": wiring})
        model = stepladder.launch.recipes.twins.Transformer(spec)
        stepladder.launch.recipes.twins.init_weights(model, spec, seed=2)
        states.append(list(model.parameters()))
    for parameters in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters, states[0], strict=True))
