"""suite=fp8 on a tiny model: the plain run is the whole model, and every figure follows from the two runs' logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.fp8 import Apart, Difference, compare, report, run
from stepladder.launch.recipes.corpus import Document
from stepladder.launch.recipes.training import Words, size
from stepladder.parallel.afd.wire import FP8, PLAIN
from stepladder.parallel.checkpoint import load_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from tests.cluster.models import write_random
from tests.composed import composed

TEXT = [
    Document("a", "def f(x):\n    return x + 1\n" * 9),
    Document("b", "é日 and more"),
    Document("c", "import re\n" * 30),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"))


def figures(directory: Path, spec: ModelSpec) -> tuple[dict[str, Any], Words]:
    """Metric, or metric and case for the two costs -> value."""
    words = Words.of_model(directory, spec.eos_ids)
    result = report("m", spec, compare(spec, directory, words.alone(TEXT)), size(TEXT))
    assert result.summary["bits per byte change, %"].holds
    return {(row.case if row.unit == "bits per byte" else row.metric): row.value for row in result.rows}, words


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_the_figures_of_a_tiny_model(residual: str, model: Path) -> None:
    spec = replace(ModelSpec.load(model), residual=residual, max_position=64)
    found, words = figures(model, spec)
    whole = Transformer(spec)
    load_weights(whole, model)
    assert found["m plain"] == pytest.approx(words.bits_per_byte(whole, TEXT, 64), rel=1e-5)
    assert found["m FP8"] != found["m plain"] and found["m FP8"] == pytest.approx(found["m plain"], rel=0.05)
    change = (found["m FP8"] / found["m plain"] - 1) * 100
    assert found["change of the cost"] == pytest.approx(change, abs=1e-9)
    assert 1e-6 < found["mean KL divergence from plain"] < 1  # random weights take errors hard
    assert 0.1 < found["largest logit error / largest logit"] < 100
    assert 50 <= found["same likeliest token"] < 100
    assert found["row of a message"] == spec.hidden_size + 4


def test_apart_is_the_whole_model_and_fp8_is_not(model: Path) -> None:
    spec, tokens = ModelSpec.load(model), torch.arange(60).view(3, 20)
    whole = Transformer(spec)
    load_weights(whole, model)
    with torch.inference_mode():
        want = whole(tokens.reshape(-1), WholeSequences(3, 20)).view(3, 20, -1)
    torch.testing.assert_close(Apart(spec, model, PLAIN)(tokens), want)
    other = Apart(spec, model, FP8)(tokens)
    assert 1e-3 < (other - want).abs().max() / want.abs().max() < 0.3


def test_a_half_that_fails_is_not_waited_for(model: Path) -> None:
    apart = Apart(ModelSpec.load(model), model, PLAIN)
    apart._ffn.blocks[1].modules = (_refuse,)
    with pytest.raises(RuntimeError, match="no FFN today"):
        apart(torch.zeros(1, 4, dtype=torch.int64))


def _refuse(*_: object) -> torch.Tensor:
    raise RuntimeError("no FFN today")


def test_differences_by_hand() -> None:
    plain, fp8, targets = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 6])
    found = Difference()
    for part in (slice(0, 2), slice(2, 5)):
        found.add(plain[part], fp8[part], targets[part])
    p, q = plain.double().softmax(-1), fp8.double().softmax(-1)
    assert found.tokens == 5 and found.agreed == sum(plain.argmax(-1) == fp8.argmax(-1))
    assert found.plain == pytest.approx(F.cross_entropy(plain, targets, reduction="sum").item(), rel=1e-5)
    assert found.fp8 == pytest.approx(-q[range(5), targets].log().sum().item(), rel=1e-5)
    assert found.divergence == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert (found.error, found.largest) == ((plain - fp8).abs().max().item(), plain.abs().max().item())


def test_a_run_takes_any_model_directory(model: Path, tmp_path: Path) -> None:
    words = ["model=path", f"model.path={model}", "model.name=tiny", "held_out_bytes=1", f"run_dir={tmp_path}"]
    options, suite = suite_of(composed("bench", "suite=fp8", *words))
    assert suite is run
    result = run(options)
    assert {row.case for row in result.rows} == {"tiny plain", "tiny FP8"}
    assert result.emulated and "wiring standard, lag 0" in result.emulated
    assert all(row.value is not None for row in result.rows)
    for word, sentence in (("held_out_bytes=0", "held_out_bytes is 0"), ("threads=0", "threads is 0")):
        with pytest.raises(ValueError, match=sentence):
            suite_of(composed("bench", "suite=fp8", *words, word))
