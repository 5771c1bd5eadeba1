"""One server per tiny model for all tests that do not harm it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from stepladder import LLM
from stepladder.launch.private_ray import PrivateRay
from tests.cluster.models import write_cycle, write_random
from tests.cluster.serving import Server, serve


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def cycle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cycle(tmp_path_factory.mktemp("cycle"))


@pytest.fixture(scope="session")
def llm(random_model: Path) -> LLM:
    """The same model as `server`'s, without HTTP."""
    return LLM(str(random_model), device="cpu")


@pytest.fixture(scope="session")
def server(random_model: Path) -> Iterator[Server]:
    with serve(random_model) as server:
        yield server


@pytest.fixture(scope="session")
def cycle(cycle_model: Path) -> Iterator[Server]:
    """Greedy text is CYCLE again and again, and never ends by itself."""
    with serve(cycle_model, {"max_model_len": 8000}) as server:
        yield server


@pytest.fixture(scope="session")
def bundled(cycle_model: Path) -> Iterator[Server]:
    """The same with up to 5 tokens per output, as speculation brings them."""
    with serve(cycle_model, {"max_model_len": 500}, tokens_per_output=5) as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateRay]:
    with PrivateRay(num_cpus=5) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
        yield cluster
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the ladder wiring."""
    directory = write_random(tmp_path_factory.mktemp("ladder"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"residual": "ladder"}))
    return directory
