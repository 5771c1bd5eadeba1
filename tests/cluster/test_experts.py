"""A mixture of experts on a real Ray: the same texts however experts are shared, and whoever dies."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import requests

from stepladder import LLM, SamplingParams
from stepladder.launch.private_ray import PrivateRay
from tests.cluster.jobs import Job, eventually, stream_all, submit
from tests.cluster.models import SPECIAL, write_tokenizer
from tests.families import write_family

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PROMPTS = [f"prompt number {n}: " + "x" * (3 * n) for n in range(4)]
TOKENS = 120
LAYOUTS = {
    "split": ("layout.tp=2", "speculate=suffix"),
    "whole": ("layout.tp=2", "layout.experts=whole"),
    "afd-split": ("layout=afd", "layout.attention=2", "layout.ffn=2"),
    "afd-whole": ("layout=afd", "layout.attention=1", "layout.ffn=2", "layout.experts=whole"),
    "afd-home": ("layout=afd", "layout.attention=2", "layout.ffn=2", "layout.experts=whole", "layout.dispatch=home"),
}

SLOW = ("whole", "afd-split", "afd-whole")  # each is half of another


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven experts, which two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = write_tokenizer(folder)
    fields = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id(SPECIAL[0])}
    return write_family(folder, "qwen2-moe", num_experts=7, max_position_embeddings=1024, **fields)


@pytest.fixture(scope="module")
def wanted(experts: Path) -> list[str]:
    llm = LLM(str(experts), device="cpu", kv_tokens=8192)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return [one.text for one in llm.generate(PROMPTS, params)]


def texts(job: Job, strike: Callable[[], None] = lambda: None) -> list[str]:
    return stream_all(job, [{"prompt": prompt, "temperature": 0} for prompt in PROMPTS], TOKENS, strike)


def parts(job: Job) -> dict[str, dict[str, Any]]:
    report = ray.get(job.actor("controller").report.remote(), timeout=30)
    return report["engines"] | report.get("pools", {})


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_texts_are_those_of_the_whole_model(
    layout: str, cluster: PrivateRay, experts: Path, wanted: list[str], tmp_path: Path
) -> None:
    options, routes = LAYOUTS[layout], "ffn" if layout.startswith("afd") else "engine-0"
    with submit(cluster, f"experts-{layout}", experts, tmp_path, "cluster.hang_seconds=5", layout=options) as job:
        assert texts(job) == wanted
        eventually(lambda: sum(parts(job)[routes]["expert_tokens"]) > TOKENS, lambda: parts(job))
        told = parts(job)[routes]
        assert len(told["expert_tokens"]) == 7 and told["expert_tokens_dropped"] == 0
        assert told["expert_imbalance"] > 1
        assert (told["expert_rank_imbalance"] > 1) == ("layout.experts=whole" in options)
        if routes == "engine-0":
            scraped = requests.get(f"{job.url}/metrics", timeout=10).text
            assert 'stepladder:expert_tokens_total{engine="engine-0",expert="6",model_name="tiny"}' in scraped
        else:
            place = job.rank(1, "ffn", 2)
            assert texts(job, lambda: os.kill(place.pid, signal.SIGKILL)) == wanted
            eventually(lambda: job.phase() == "ready", job.phase)
