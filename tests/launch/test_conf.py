"""Every choice of every group composes and builds, and the manual lists exactly the options there are."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir

from stepladder.cluster.config import Deployment, Group
from stepladder.cluster.gateway.metrics import Metrics
from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.generate import GenerateConfig
from stepladder.launch.serve import check_here, deployment_of
from stepladder.launch.train import recipe_of
from stepladder.launch.typed_config import build, plain
from stepladder.parallel.generation_defaults import GenerationDefaults
from stepladder.workers.params import SamplingParams
from stepladder.workers.speculation.kinds import KINDS, WITH_WEIGHTS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "launch" / "conf"
MANUAL = (ROOT / "docs" / "operating.md").read_text()
GROUPS = ("model", "cluster", "layout", "monitor")  # of launch.serve, that may go together in any way
PATH = ["model.path=/m", "model.name=m"]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STEPLADDER_API_KEY", "k")
    with initialize_config_dir(str(CONF), version_base=None):
        yield


@pytest.mark.parametrize("choice", list(product(*map(choices, GROUPS))), ids="-".join)
def test_every_choice_of_every_group_serves(choice: tuple[str, ...]) -> None:
    words = [f"{group}={name}" for group, name in zip(GROUPS, choice, strict=True)]
    if "layout=afd" in words:
        words.append("cluster.device=cpu")  # the only one so far; test_a_wrong_option_is_one_sentence has the other
    deployment = deployment_of(compose("serve", words + (PATH if "model=path" in words else [])))
    assert deployment.cluster.start_seconds > deployment.cluster.hang_seconds > deployment.cluster.ping_seconds
    assert deployment.cluster.orphan_seconds > deployment.cluster.hang_seconds


@pytest.mark.parametrize("name", choices("speculate"))
def test_every_way_to_speculate(name: str) -> None:
    words = [f"speculate={name}", *(["speculate.model=/m"] if name in WITH_WEIGHTS else [])]
    deployment = deployment_of(compose("serve", words))
    assert deployment.speculate.kind == name and deployment.speculate.is_on == (name != "off")
    assert sorted({*KINDS, "off"}) == choices("speculate")


def test_a_drafter_that_learns() -> None:
    """It needs no directory then, and brings a group of its own, which serving does not need."""
    deployment = deployment_of(compose("serve", ["speculate=hybrid", "train=online", "train.ranks=2"]))
    *engines, trainer = deployment.groups()
    assert engines == deployment.layout.groups() and trainer == Group("trainer", "trainer", 2, needed=False)
    assert deployment_of(compose("serve", ["speculate=suffix"])).groups() == engines
    check_here(deployment)


@pytest.mark.parametrize("name", choices("cluster"))
def test_a_cluster_of_gpus_has_sizes_for_gpus(name: str) -> None:
    """And what is given on the command line stands."""
    deployment = deployment_of(compose("serve", [f"cluster={name}"]))
    engine, tokens = deployment.engine, deployment.kv.tokens
    if deployment.cluster.device == "cuda":
        assert (engine.max_sequences, engine.max_step_tokens, engine.max_queued_tokens) == (256, 8192, 1 << 20)
        assert tokens is None
    else:
        assert (engine.max_sequences, engine.max_step_tokens, tokens) == (64, 512, 16384)
    given = deployment_of(compose("serve", ["kv.tokens=160", "engine.max_sequences=3", f"cluster={name}"]))
    assert (given.kv.tokens, given.engine.max_sequences) == (160, 3)
    assert given.engine.batch_invariant is False and given.gateway == deployment.gateway


def test_there_is_no_group_that_nobody_composes() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {*GROUPS, "speculate", "train", "secrets", "suite", "recipe"}


@pytest.mark.parametrize("name", choices("secrets"))
def test_secrets_come_from_the_environment(name: str) -> None:
    deployment = deployment_of(compose("serve", [f"+secrets={name}"]))
    assert deployment.gateway.api_key == "k" and deployment.gateway.host == "127.0.0.1"


def test_an_empty_secret_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPLADDER_API_KEY", "")
    with pytest.raises(ValueError, match=r"gateway\.api_key is empty; give a key"):
        deployment_of(compose("serve", ["+secrets=env"]))


@pytest.mark.parametrize("name", choices("suite"))
def test_every_suite_builds(name: str) -> None:
    options, _ = suite_of(compose("bench", [f"suite={name}", "run_dir=/r"]))
    assert options.name == name and options.run_dir == "/r"
    if name == "serve":
        assert deployment_of(compose("serve", shlex.split(options.deploy))).layout.tp == 2


@pytest.mark.parametrize("name", choices("recipe"))
def test_every_recipe_builds(name: str) -> None:
    needed = {"convert": ["model.path=/m", "ladder_layers=1"], "head": ["model.path=/m"]}.get(name, [])
    assert recipe_of(compose("train", [f"recipe={name}", "run_dir=/r", *needed]))[0].name == name
    for missing in needed:
        given = [word for word in needed if word != missing]
        with pytest.raises(ValueError, match=rf"{missing.partition('=')[0]} is missing; give"):
            recipe_of(compose("train", [f"recipe={name}", "run_dir=/r", *given]))


@pytest.mark.parametrize("model", choices("model"))
def test_generate_takes_every_model_and_every_sampling_parameter(model: str) -> None:
    values = plain(compose("generate", ["prompts=p.jsonl", f"model={model}", *(PATH if model == "path" else [])]))
    config = build(GenerateConfig, values)
    assert config.output == "p.jsonl.out.jsonl"
    known = {f.name for f in fields(SamplingParams)}
    assert set(config.sampling) == known - {"logprobs", "prompt_logprobs"}
    given = {name: value for name, value in config.sampling.items() if value is not None}
    assert build(SamplingParams, given) == SamplingParams()
    assert set(config.sampling) - set(given) == {
        *({f.name for f in fields(GenerationDefaults)} - {"eos_ids"}),
        "structured_outputs",
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=path", "model.name=m"], "model.path is missing; give model.path=..."),
        (["+engine.speed=9"], "engine.speed is not an option; engine takes"),
        (["+spede=9"], "spede is not an option; the top level takes"),
        (["layout.tp=two"], "layout.tp is 'two': expected `int`, got `str`"),
        (["layout.tp=0"], "layout.tp is 0; it must be at least 1"),
        (["layout=afd", "layout.ffn=0"], "layout.ffn is 0; it must be at least 1"),
        (["layout=afd", "layout.tp=2"], "layout.tp is 2, but layout.kind is afd; use layout.attention and layout.ffn"),
        (["layout.attention=2"], "layout.attention is 2, but layout.kind is tp; choose layout=afd for it"),
        (["layout=afd", "layout.schedule=fast"], "layout.schedule is 'fast'; it must be one of auto, pingpong, ladder"),
        (["layout=afd", "layout.wire=fp4"], "layout.wire is 'fp4'; it must be one of plain, fp8"),
        (["layout=afd", "layout.dispatch=all"], "layout.dispatch is 'all'; it must be one of broadcast, home"),
        (["layout.dispatch=home"], "layout.dispatch is home, but layout.kind is tp"),
        (["layout.experts=some"], "layout.experts is 'some'; it must be one of split, whole"),
        (["layout=afd", "layout.micro_batches=17"], "layout.micro_batches is 17; it must be at most 16"),
        (["layout=afd", "layout.schedule=ladder", "layout.micro_batches=2"], "layout.schedule=ladder has one"),
        (["layout=afd", "cluster.device=cuda"], "layout=afd runs on cluster.device=cpu only so far"),
        (["layout=afd", "engine.lookahead=1"], "engine.lookahead is 1, but with layout=afd"),
        (["gateway.api_key=' '"], "gateway.api_key is empty; give a key that clients can send, or null to let"),
        (["kv.memory_fraction=0.5"], "kv.memory_fraction is 0.5, but kv.tokens is 16384, so that nothing is measured"),
        (["gateway.port=70000"], "gateway.port is 70000; it must be between 0 and 65535"),
        (["gateway.otlp_traces_endpoint=grpc://c:4317"], "gateway.otlp_traces_endpoint is 'grpc://c:4317'; it must be"),
        (["cluster.device=tpu"], "cluster.device is 'tpu'; it must be 'cpu' or 'cuda'"),
        (["cluster.strategy=RANDOM"], "cluster.strategy is 'RANDOM'; it must be one of Ray's placement strategies"),
        (["monitor.wandb=on"], "monitor.wandb is"),
        (["train=online"], "train.kind is online, but speculate.kind is off; what learns is the head of"),
        (["train.kind=yes"], "train.kind is 'yes'; it must be off or online"),
        (["train.ring_mb=0"], "train.ring_mb is 0"),
        (["train.max_tpot_loss=1"], "train.max_tpot_loss is 1"),
        (["train.objective=mse"], "mse"),
        (["speculate=hybrid"], "the kinds model, head, hybrid need a directory"),
        (["run_dir=runs"], "run_dir is 'runs'; it must be absolute"),
        (["~name"], "name"),
    ],
)
def test_a_wrong_option_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        deployment_of(compose("serve", words))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def options_of(kind: Any, where: str = "") -> Iterator[str]:
    for name, inner in get_type_hints(kind).items():
        yield from options_of(inner, f"{where}{name}.") if is_dataclass(inner) else [where + name]


def manual_rows(kind: str) -> dict[str, str]:
    """First column -> second, of the manual's table with this heading."""
    table = re.search(rf"^\| {kind} \|.*\n\|[-|]+\n((?:\|.*\n)+)", MANUAL, re.M)
    assert table, f"docs/operating.md has no table of {kind}s"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()]
    return {name: row[1] for row in cells for name in re.findall(r"`([^`]+)`", row[0])}


def test_the_manual_lists_every_option() -> None:
    rows, known = manual_rows("option"), set(options_of(Deployment)) - {"secret"}
    assert not known - rows.keys(), "options that docs/operating.md does not explain"
    assert not rows.keys() - known, "options in docs/operating.md that do not exist"


def test_the_manual_has_the_right_defaults() -> None:
    values = plain(compose("serve", []))
    for name, default in manual_rows("option").items():
        value: Any = values
        for key in name.split("."):
            value = value[key]
        assert name == "run_dir" or yaml.safe_load(default) == value, name


def test_the_manual_lists_every_metric() -> None:
    families = {family.name: family.type for family in Metrics("m").registry.collect()}
    names = {name.removeprefix("stepladder:") + "_total" * (kind == "counter") for name, kind in families.items()}
    assert set(manual_rows("metric")) == names
    for name, kind in manual_rows("metric").items():
        assert families["stepladder:" + (name.removesuffix("_total") if kind == "counter" else name)] == kind
