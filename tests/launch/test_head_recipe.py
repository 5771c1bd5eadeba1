"""`launch.train recipe=head`: from prompts to a head that a server takes."""

import json
from pathlib import Path

import pytest

from stepladder.cluster.config import Deployment
from stepladder.launch.recipes.head import run
from stepladder.launch.serve import check_here, deployment_of
from stepladder.launch.train import recipe_of
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.speculation.head.files import read_head
from tests.composed import composed
from tests.llama import write_llama
from tests.tokenizers_of import write_byte_level


def recipe(*words: str) -> tuple:  # type: ignore[type-arg]
    return recipe_of(composed("train", "recipe=head", *words))


def serving(model: Path, head: Path) -> Deployment:
    words = ["model=path", f"model.path={model}", "model.name=m", "speculate=hybrid", f"speculate.model={head}"]
    return deployment_of(composed("serve", *words))


def test_a_head_is_taught_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_byte_level(write_llama(tmp_path / "model", seed=3, vocab_size=320))
    (tmp_path / "prompts.txt").write_text("".join(f"a prompt number {number}\n" for number in range(12)))
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "another"}) + "\n")
    words = [f"model.path={model}", f"prompts=[{tmp_path}/prompts.txt,{tmp_path}/more.jsonl]", "tokens=12", "steps=20"]
    options, run_it = recipe(*words, f"run_dir={tmp_path}/run", "held_out=4", "drafted=50", "inner=16", "batch=8")
    assert run_it is run
    run_it(options)
    head = read_head(tmp_path / "run" / "head", model, ModelSpec.load(model))
    figures = json.loads((tmp_path / "run" / "head.json").read_text())
    assert figures == head.manifest.figures and figures["answers"] == 13 and figures["tokens"] <= 13 * 12
    assert len(head.tokens) == 50 and head.net.inner == 16 and head.manifest.version == 1
    assert head.manifest.scores == {"overlap": figures["taught"]["overlap"][0]} and len(head.manifest.sha256) == 64
    assert (head.manifest.window.requests, head.manifest.window.tokens) == (13, figures["tokens"])
    assert {name: len(figures[when][name]) for when in ("fit", "taught") for name in ("overlap", "same")} == {
        "overlap": 4, "same": 4,
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows if "train/step" in row] == [10, 20]
    assert rows[-1]["held_out/overlap_1"] == pytest.approx(figures["taught"]["overlap"][0])
    taken = serving(model, tmp_path / "run" / "head")
    check_here(taken)
    other = write_byte_level(write_llama(tmp_path / "other", seed=4, vocab_size=320))
    with pytest.raises(ValueError, match="was made for another model than"):
        check_here(serving(other, tmp_path / "run" / "head"))
    said = capsys.readouterr().out
    assert said.count("overlap with the model's distribution") == 2 and f"written to {tmp_path}/run/head" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["held_out=1"], "held_out is 1; it must be 2 or more"),
        (["steps=-1"], "steps is -1"),
        (["rate=0"], "rate 0"),
        (["temperatures=[]"], "it must hold one or more"),
        (["temperatures=[-1.0]"], "none below 0"),
        (["kinds=[poetry]"], "kinds has 'poetry'; it takes prose, rewriting, code, tables"),
        (["kinds=[]"], "there is nothing to learn from; give prompts"),
        (["drafted=0"], "drafted is 0"),
        (["objective=mse"], "there is no objective 'mse'; there are forward_kl"),
    ],
)
def test_options_that_cannot_be(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe("model.path=/m", *words)
