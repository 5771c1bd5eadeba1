"""Every command that our documents and deployment files tell a person to run can be run."""

import json
import re
import shlex
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from stepladder.cluster.config import Deployment
from stepladder.launch import ctl, fetch, generate
from stepladder.launch.bench.__main__ import SUITES, suite_of
from stepladder.launch.serve import deployment_of
from stepladder.launch.typed_config import build, plain
from tests.composed import composed
from tests.fresh import SOURCES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(DEPLOY.iterdir())]
_ELLIPSIS = re.compile(r"^[\[<.…]")


def commands(module: str) -> list[tuple[str, tuple[str, ...]]]:
    """(file, words behind it) of every command that runs this module, by its name or by `stepladder`.

    Lines continued by a backslash or by YAML are folded first.
    """
    spelled = rf"(?:python -m {re.escape(module)}|stepladder {module.removeprefix('launch.')})"
    found = []
    for path in TEXTS:
        for text in _texts(path):
            for match in re.finditer(rf"{spelled}\b([^\n`|#\"]*)", text):
                words = shlex.split(match[1].split("&&")[0].split(";")[0])
                found.append((path.name, tuple(words)))
    return found


def _texts(path: Path) -> Iterator[str]:
    """A YAML file is read, so that folded strings come out as the program will see them."""
    if path.suffix == ".yaml":
        yield from (text for document in yaml.safe_load_all(path.read_text()) for text in _strings(document))
    else:
        yield re.sub(r"\\\n\s*", " ", path.read_text())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def runnable(module: str) -> list[Any]:
    """Without those that only show a form, such as `[key=value]` or `...`; test_hydra_command.py has flags."""
    kept = [(f, w) for f, w in commands(module) if not any(_ELLIPSIS.match(word) or word[:2] == "--" for word in w)]
    return [pytest.param(words, id=f"{file}: {' '.join(words)[:60]}") for file, words in kept]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPLADDER_API_KEY", "secret")


@pytest.mark.parametrize("words", runnable("launch.serve"))
def test_launch_serve_makes_a_deployment(words: tuple[str, ...]) -> None:
    deployment = deployment_of(composed("serve", *words))
    assert isinstance(deployment, Deployment)
    if "+secrets=env" in words:
        assert deployment.gateway.api_key == "secret"


@pytest.mark.parametrize("words", runnable("launch.bench"))
def test_launch_bench_makes_a_suite(words: tuple[str, ...]) -> None:
    options, _ = suite_of(composed("bench", *words))
    assert options.name in SUITES


@pytest.mark.parametrize("words", runnable("launch.generate"))
def test_launch_generate_makes_a_configuration(words: tuple[str, ...]) -> None:
    assert build(generate.GenerateConfig, plain(composed("generate", *words))).prompts


@pytest.mark.parametrize("words", runnable("launch.fetch"))
def test_launch_fetch_makes_a_configuration(words: tuple[str, ...]) -> None:
    assert build(fetch.FetchConfig, plain(composed("fetch", *words))).model.path


@pytest.mark.parametrize("words", runnable("launch.ctl"))
def test_launch_ctl_takes_these_words(words: tuple[str, ...]) -> None:
    if words:
        kind, _ = ctl.COMMANDS[words[0]]
        build(kind, ctl.pairs(words[1:]), strict=False)


def test_there_is_something_to_check() -> None:
    files = {file for file, _ in commands("launch.serve")}
    assert files >= {"README.md", "operating.md", "rayjob.yaml"}
    assert len(runnable("launch.serve")) >= 4 and len(runnable("launch.ctl")) >= 3
    assert len(runnable("launch.bench")) >= 1 and len(runnable("launch.generate")) >= 1
    assert len(runnable("launch.fetch")) >= 2


def test_the_cluster_file_is_what_rays_launcher_takes() -> None:
    schema = json.loads((resources.files("ray") / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["provider"]["type"] == "local" and len(config["provider"]["worker_ips"]) == config["max_workers"]
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert "RAY_JOB_STOP_WAIT_TIME_S" in head and "--autoscaling-config=" in head and "$RAY_HEAD_IP" in worker


def test_the_rayjob_holds_together() -> None:
    """Selectors find their pods, volumes and secrets exist, ports agree with the entrypoint."""
    objects = {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())}
    job = objects["RayJob", "stepladder"]["spec"]
    cluster = job["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim")
            assert not claim or ("PersistentVolumeClaim", claim["claimName"]) in objects
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    head = pods[0]["spec"]["containers"][0]
    key = next(v for v in head["env"] if v["name"] == "STEPLADDER_API_KEY")["valueFrom"]["secretKeyRef"]
    assert key["key"] in objects["Secret", key["name"]]["stringData"]
    gateway = objects["Service", "stepladder-gateway"]["spec"]
    assert gateway["selector"].items() <= pods[0]["metadata"]["labels"].items()
    assert not gateway["selector"].items() <= pods[1]["metadata"]["labels"].items()
    port = next(p["containerPort"] for p in head["ports"] if p["name"] == "gateway")
    assert f"gateway.port={port}" in job["entrypoint"].split() and gateway["ports"][0]["port"] == port
    assert f"http://stepladder-gateway:{port}" in objects["ConfigMap", "stepladder-front"]["data"]["default.conf"]
    front = objects["Deployment", "stepladder-front"]["spec"]["template"]
    assert front["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert objects["Service", "stepladder"]["spec"]["selector"] == front["metadata"]["labels"]


def test_the_rayjobs_workers_have_room_for_the_ranks() -> None:
    job = next(o for o in yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text()) if o["kind"] == "RayJob")["spec"]
    words = shlex.split(job["entrypoint"])[2:]
    layout = deployment_of(composed("serve", *words)).layout
    gpus = 0
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["replicas"] * int(limits["nvidia.com/gpu"])
    assert layout.tp * layout.replicas <= gpus


def test_the_image_holds_every_package() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for package in SOURCES:
        assert f"COPY {package} {package}" in text
    assert "\nUSER stepladder" in text
