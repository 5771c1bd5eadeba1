"""One thread per rank, no deadline per example, and the checkpoints that several tests read."""

import os
import random
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.llama import SMALL, write_llama
from tests.smollm2 import smollm2_in

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # Ray reads them once, when imported
torch.set_num_threads(1)
settings.register_profile(
    "stepladder", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("stepladder")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GQA 4:2, head and embedding apart."""
    return write_llama(tmp_path_factory.mktemp("untied"), seed=1)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GQA 4:1, one KV head for all, head and embedding tied."""
    return write_llama(tmp_path_factory.mktemp("tied"), seed=2, tie_word_embeddings=True, num_key_value_heads=1)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real model in fp32; its parent is the cache that it lies in. Half a gigabyte, which does not stay."""
    cache = tmp_path_factory.mktemp("models")
    yield smollm2_in(cache)
    shutil.rmtree(cache)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of mixed lengths, 1 to 40."""
    draw = random.Random(7)
    return [[draw.randrange(SMALL["vocab_size"]) for _ in range(length)] for length in (1, 17, 5, 40, 2, 23, 9)]
