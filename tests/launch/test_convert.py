"""Converting for real: every family survives, a killed run ends as if it had not been killed, and text is read well."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

import stepladder.launch.recipes.convert
from stepladder import LLM, SamplingParams
from stepladder.cluster.monitor import Monitors, open_monitor
from stepladder.launch.recipes.convert import ConvertRecipe, converted, run, some, write_model
from stepladder.launch.recipes.convert_report import curve_of, report_of
from stepladder.launch.recipes.corpus import Document
from stepladder.launch.recipes.documents import given_text
from stepladder.launch.recipes.training import Words
from stepladder.launch.train import recipe_of
from stepladder.parallel.checkpoint import load_weights, sharded_parameters
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.model import Transformer
from stepladder.parallel.spec import ModelSpec
from tests.composed import composed
from tests.families import FAMILIES, write_family
from tests.gguf_files import Q8_0, byte_level, write_checkpoint, write_gguf
from tests.llama import write_llama
from tests.tokenizers_of import write_byte_level

CONF = Path(__file__).parents[2] / "launch" / "conf"
WORDS = 320
TEXT = ["def main():\n    return 'hello, world'\n", "The quick brown fox jumps over the lazy dog.\n"]
FEW_STEPS = [
    "train.tokens=512",
    "train.batch_tokens=64",
    "train.contexts=[32]",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "train.adam_lr=0.002",
    "train.precision=fp32",
    "measure_every=2",
]


def recipe(*overrides: str) -> ConvertRecipe:
    return recipe_of(composed("train", "recipe=convert", *overrides))[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents: twenty in a file of JSON lines, twenty in files of their own."""
    directory = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": TEXT[i % 2] * (i % 5 + 1) + str(i), "id": i}) for i in range(20)]
    (directory / "docs.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "deep").mkdir()
    for i in range(20):
        (directory / "deep" / f"{i}.txt").write_text(TEXT[i % 2] * (i % 4 + 1) + f"number {i}")
    (directory / "deep" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    return directory


def with_tokenizer(directory: Path) -> Path:
    write_byte_level(directory, WORDS)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))
    return directory


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(write_llama(tmp_path_factory.mktemp("standard"), seed=3, vocab_size=WORDS))


def logits(directory: Path, spec: ModelSpec | None = None) -> torch.Tensor:
    model = Transformer(spec or ModelSpec.load(directory))
    load_weights(model, directory)
    return model.logits(model(torch.arange(24), WholeSequences(1, 24)))


def test_from_configuration_to_a_model_that_can_be_served(
    tmp_path: Path, standard: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "recipe=convert"])
    shown: dict[str, Any] = {}

    def opened(*args: Any) -> Monitors:
        shown.update(args[-1])
        return open_monitor(*args)

    monkeypatch.setattr("stepladder.launch.recipes.training.open_monitor", opened)
    run(recipe(f"run_dir={tmp_path}", f"model.path={standard}", "ladder_layers=2", f"data=[{text}]", *FEW_STEPS))
    spec = ModelSpec.load(tmp_path / "model")
    assert (spec.residual, spec.ladder_layers, spec.dtype) == ("ladder", (1, 2), torch.float32)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (standard / "tokenizer.json").read_bytes()
    report = json.loads((tmp_path / "convert.json").read_text())
    cases = [
        "before",
        "converted, untrained",
        *(f"converted, after {n} tokens" for n in (128, 256, 384, 512)),
        "converted, as written",
    ]
    assert [row["case"] for row in report["rows"]] == cases
    costs = [row["value"] for row in report["rows"]]
    assert costs[1] != costs[0] and costs[-1] < costs[1]  # another wiring costs, training helps
    assert costs[-1] == costs[-2]  # in fp32
    assert (shown["model"]["path"], shown["data"], shown["ladder_layers"]) == (str(standard), (str(text),), 2)
    assert shown["model"]["residual"] == "ladder" and shown["model"]["hidden_size"] == spec.hidden_size
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [(r["train/step"], r[key]) for r in rows for key in r if key.startswith("held_out/")]
    assert measured == list(zip((0, 0, 2, 4, 6, 8, 8), costs, strict=True))
    assert report["summary"]["cost of the written model, of before"]["value"] == pytest.approx(costs[-1] / costs[0])
    assert (tmp_path / "convert.png").stat().st_size > 5_000
    assert "converted, untrained" in capsys.readouterr().out
    (done,) = LLM(str(tmp_path / "model")).generate(["def "], SamplingParams(max_tokens=4, temperature=0.0))
    assert done.text


def test_the_cost_is_that_of_the_model_which_others_load(tmp_path: Path, standard: Path, text: Path) -> None:
    """A bf16 checkpoint trains in fp32 and is rounded in the end."""
    source = tmp_path / "source"
    shutil.copytree(standard, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    options = [f"run_dir={tmp_path}", f"model.path={source}", "ladder_layers=2", f"data=[{text}]"]
    run(recipe(*options, *FEW_STEPS))
    trained, written = [row["value"] for row in json.loads((tmp_path / "convert.json").read_text())["rows"]][-2:]
    costs = json.loads((tmp_path / "measured.json").read_text())["bits_per_byte"]
    assert trained != written == costs["written"]
    assert ModelSpec.load(tmp_path / "model").dtype == torch.bfloat16
    run(recipe(*options, *FEW_STEPS))  # from its checkpoint: nothing to train, the same model
    assert json.loads((tmp_path / "measured.json").read_text())["bits_per_byte"] == costs


def test_a_killed_conversion_continues_to_the_same_model(
    tmp_path: Path, standard: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 5, after the checkpoint at 3 and the measurement at 4."""
    options = [f"model.path={standard}", "ladder_layers=[0,2]", f"data=[{text}]", *FEW_STEPS]
    run(recipe(f"run_dir={tmp_path / 'whole'}", *options))

    class Killed(BaseException):
        pass

    def train_and_die(trainer: Any, *rest: Any) -> None:
        after = rest[-1]
        after(0)
        for step in trainer.run(lambda row: None):
            after(step)
            if step == 5:
                raise Killed

    whole = stepladder.launch.recipes.convert.run_with_progress
    monkeypatch.setattr("stepladder.launch.recipes.convert.run_with_progress", train_and_die)
    with pytest.raises(Killed):
        run(recipe(f"run_dir={tmp_path / 'killed'}", *options))
    monkeypatch.setattr("stepladder.launch.recipes.convert.run_with_progress", whole)
    monkeypatch.setattr(
        "stepladder.launch.recipes.convert.Costs.measure",
        measure_anew := MeasureOnce(stepladder.launch.recipes.convert.Costs.measure),
    )
    run(recipe(f"run_dir={tmp_path / 'killed'}", *options))
    assert measure_anew.keys == ["6", "8", "written"]
    for name in ("model/model.safetensors", "model/config.json", "measured.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    with pytest.raises(ValueError, match=r"measured\.json was written with other settings"):
        run(recipe(f"run_dir={tmp_path / 'killed'}", *options, "train.adam_lr=0.1"))


class MeasureOnce:
    """`Costs.measure`, remembering what it was asked for."""

    def __init__(self, measure: Any) -> None:
        self.measure, self.keys = measure, list[str]()

    def __get__(self, costs: Any, kind: Any) -> Any:
        return lambda key, model: (self.keys.append(key), self.measure(costs, key, model))


def test_a_gguf_file_is_converted(tmp_path: Path, text: Path) -> None:
    """Its dequantised weights are what is measured before, and what is trained on; its tokenizer goes along."""
    template = {"chat_template": "{{ messages[0].content }}"}
    path = write_gguf(tmp_path / "tiny.gguf", write_checkpoint(tmp_path, "llama"), Q8_0, byte_level(**template))
    options = [f"model.path={path}", f"model.cache={tmp_path / 'cache'}", "ladder_layers=1", f"data=[{text}]"]
    run(recipe(f"run_dir={tmp_path}", *options, *FEW_STEPS, "train.tokens=64"))
    after = ModelSpec.load(tmp_path / "model")
    assert after.ladder_layers == (2,) and after.eos_ids == (269, 270)
    [got] = LLM(str(tmp_path / "model"), "cpu").chat(
        [{"role": "user", "content": "hello"}], SamplingParams(max_tokens=3)
    )
    assert got.prompt == "hello" and (tmp_path / "model" / "generation_config.json").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives(tmp_path: Path, family: str, text: Path) -> None:
    """Trained so little that nothing changes but the wiring, each gives the logits of its own weights rewired."""
    source = with_tokenizer(write_family(tmp_path / "source", family, vocab_size=WORDS))
    options = [f"model.path={source}", "ladder_layers=1", f"data=[{text}]", *FEW_STEPS, "train.tokens=64"]
    run(recipe(f"run_dir={tmp_path}", *options, "train.adam_lr=1e-12", "held_out_bytes=50"))
    before, after = ModelSpec.load(source), ModelSpec.load(tmp_path / "model")
    assert after == converted(before, 1)
    assert after.residual == ("ladder-parallel" if before.residual == "parallel" else "ladder")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == f"stepladder_{before.family}" and config["architectures"][0].startswith("Stepladder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    want = theirs(torch.arange(24)[None]).logits[0].detach()
    torch.testing.assert_close(logits(tmp_path / "model"), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    rewired = logits(source, after)
    torch.testing.assert_close(logits(tmp_path / "model"), rewired, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rewired, logits(source), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "cohere-qk-norm"])
def test_every_parameter_is_trained(tmp_path: Path, family: str, text: Path) -> None:
    """Tied and untied, biases and all kinds of norms."""
    source = with_tokenizer(write_family(tmp_path / "source", family, vocab_size=WORDS))
    options = [f"model.path={source}", "ladder_layers=1", f"data=[{text}]", *FEW_STEPS, "held_out_bytes=50"]
    run(recipe(f"run_dir={tmp_path}", *options, "train.muon_lr=0.01", "train.clip=null"))
    spec = ModelSpec.load(tmp_path / "model")
    models = [Transformer(spec), Transformer(spec)]
    for model, directory in zip(models, (source, tmp_path / "model"), strict=True):
        load_weights(model, directory)
    for old, new in zip(*map(sharded_parameters, models), strict=True):
        assert not torch.equal(old, new), [piece.name for piece in old.pieces]


def test_a_bf16_checkpoint_stays_one(tmp_path: Path, standard: Path) -> None:
    spec = replace(converted(ModelSpec.load(standard), 1), dtype=torch.bfloat16)
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((standard / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = Transformer(replace(spec, dtype=torch.float32))
    load_weights(model, standard)
    write_model(model, spec, source, tmp_path / "model")
    again = Transformer(ModelSpec.load(tmp_path / "model"))
    load_weights(again, tmp_path / "model")
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert new.dtype == torch.bfloat16 and torch.equal(old.bfloat16(), new)


SPEC = ModelSpec(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=4, num_heads=2, num_kv_heads=2,
                 head_dim=4, max_position=8)  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "layers", "sentence"),
    [
        (SPEC, 5, "ladder_layers is 5; the model has 4 layers, so it must be 1 to 4"),
        (SPEC, 0, "ladder_layers is 0; the model has 4 layers"),
        (SPEC, (), "ladder_layers is []; it must name some of the layers 0 to 3"),
        (SPEC, (1, 4), "ladder_layers is [1, 4]; it must name some of the layers 0 to 3"),
        (replace(SPEC, residual="ladder"), 2, "layer 2 of the checkpoint is ladder already; choose other layers"),
        (replace(SPEC, residual="ladder", ladder_layers=(3,)), 1, "layer 3 of the checkpoint is ladder already"),
    ],
)
def test_layers_that_cannot_be_converted_are_refused(spec: ModelSpec, layers: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        converted(spec, layers)
    assert sentence in str(error.value)


def test_more_layers_can_follow() -> None:
    first = converted(SPEC, 1)
    assert converted(first, (0, 2)).ladder_layers == (0, 2, 3)
    assert converted(replace(SPEC, residual="parallel"), 4).residual == "ladder-parallel"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tolerance=-0.1", "tolerance is -0.1; it must not be negative"),
        ("measure_every=0", "measure_every is 0; it must be at least 1"),
        ("held_out=[x]", "held_out needs data"),
        ("ladder_layers=half", "ladder_layers is 'half'"),
        ("+model.residual=ladder", "model.residual is not an option; model takes cache, path"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe("run_dir=/r", "model.path=/m", "ladder_layers=1", override)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_converted_is_refused(tmp_path: Path, standard: Path, text: Path) -> None:
    def convert(*overrides: str) -> None:
        run(recipe(f"run_dir={tmp_path}", "ladder_layers=1", f"data=[{text}]", *overrides))

    mixture = tmp_path / "mixture"
    mixture.mkdir()
    config = json.loads((standard / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    with pytest.raises(ValueError, match="num_local_experts is 8; for llama only None is supported"):
        convert(f"model.path={mixture}")
    with pytest.raises(ValueError, match=r"train\.contexts has 512, more than the model's 256 positions"):
        convert(f"model.path={standard}")
    (mixture / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (mixture / "tokenizer.json").write_bytes((standard / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="has no eos_token_id, which must end every document"):
        convert(f"model.path={mixture}", *FEW_STEPS)


@pytest.mark.slow
def test_two_ranks_convert_as_one_does(tmp_path: Path, standard: Path, text: Path) -> None:
    """Under `torchrun`, through the command."""
    measured = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        run_dir = tmp_path / str(len(launcher))
        options = [
            "recipe=convert",
            f"run_dir={run_dir}",
            f"model.path={standard}",
            "ladder_layers=2",
            f"data=[{text}]",
        ]
        command = [sys.executable, *launcher, "-m", "launch.train", *options, *FEW_STEPS]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=CONF.parents[1], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ModelSpec.load(run_dir / "model").ladder_layers == (1, 2)
        measured.append(json.loads((run_dir / "measured.json").read_text())["bits_per_byte"])
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


@pytest.mark.parametrize("begins", [True, False])
def test_documents_have_the_tokens_around_them_that_the_model_knows(tmp_path: Path, begins: bool) -> None:
    """A token that the tokenizer puts before every text comes before every document, else only its end parts them."""
    tokenizer = Tokenizer.from_file(str(write_byte_level(tmp_path) / "tokenizer.json"))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<|user|> $0", special_tokens=[("<|user|>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = Words.of_model(tmp_path, (0,))
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a<|end|>", "b"))
    start = [1] if begins else []
    documents = [Document("a", "a<|end|>"), Document("b", "b")]
    assert words.stream(documents[1:]).tolist() == [*start, *b, 0]
    spelled = words.encode(documents[0])
    assert len(spelled) > len(start) + len(a) + 1 and 0 not in spelled[:-1]  # "<|end|>" in a text is only text
    with pytest.raises(ValueError, match="has no eos_token_id"):
        Words.of_model(tmp_path, ())


def test_text_is_read_from_files_lines_and_directories(text: Path, tmp_path: Path) -> None:
    corpus = given_text([str(text)], None, "text")
    names = {document.name for document in (*corpus.train, *corpus.held_out)}
    assert len(names) == 40 and "docs.jsonl:20" in names
    apart = given_text([str(text / "docs.jsonl")], [str(text)], "text")
    assert len(apart.train) == 20 and len(apart.held_out) == 20  # nothing is measured that is trained on


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', "a.jsonl, line 3 has no text in the field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2 has no text in the field 'text'"),
        ("a.jsonl", b"[1\n", "a.jsonl, line 1: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + b"[" * 200_000,
            "a.jsonl, line 2 is nested too deeply; at most 100 levels",
        ),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: not valid JSON: Exceeds the limit"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text: invalid start byte at byte 0; leave it out of data"),
        ("a.txt", b"  \n", "has no text to train on"),
        ("a.txt", b"one document", "there is no text to measure on that is not trained on; give held_out=[paths]"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, file: str, content: bytes, sentence: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        given_text([str(tmp_path / file)], None, "text")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "three"}\r\n'.encode())
    corpus = given_text([str(tmp_path / "a.txt")], [str(tmp_path / "b.jsonl")], "text")
    assert {d.text for d in corpus.train} == {"one\ntwo"} and {d.text for d in corpus.held_out} == {"three"}


def test_a_path_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="/nowhere does not exist; data and held_out must name files or directories"):
        given_text(["/nowhere"], None, "text")


def test_some_text_is_the_same_text_every_time() -> None:
    documents = [Document(f"{i}", "x" * 10) for i in range(50)]
    assert some(documents, 95) == some(documents[::-1], 95)
    assert len(some(documents, 95)) == 10 and len(some(documents, None)) == 50


def test_the_report_says_when_the_model_was_back() -> None:
    costs = {"before": 1.0, "0": 3.0, "4": 1.03, "8": 1.015, "12": 1.01, "written": 1.012}
    curve = curve_of(costs, 100)
    assert curve == {0: 3.0, 400: 1.03, 800: 1.015, 1200: 1.01}
    summary = report_of(1.0, curve, 1.012, 0.02).summary
    assert summary["tokens until first recovered"].value == 800
    assert summary["cost of the written model, of before"].holds
    never = report_of(1.0, {0: 3.0, 400: 1.03}, 1.03, 0.02).summary
    assert never["tokens until first recovered"].value is None
    assert not any(goal.holds for goal in never.values())
