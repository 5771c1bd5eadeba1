"""A random model, what runs it, and what it writes without a drafter."""

from pathlib import Path

import pytest

from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.executor import Executor
from tests.llama import write_llama
from tests.workers.speculation.serving import LIMITS, Texts, requests, serve


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("coupled"), seed=3)


@pytest.fixture(scope="module")
def executor(directory: Path) -> Executor:
    return whole_executor(ModelSpec.load(directory), str(directory), SingleRank(), LIMITS.num_blocks, LIMITS.block_size)


@pytest.fixture(scope="module")
def plain(executor: Executor) -> Texts:
    return serve(executor, requests())[0]
