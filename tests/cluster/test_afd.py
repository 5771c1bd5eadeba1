"""layout=afd on a real Ray: the same API and texts, whoever dies."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from stepladder import LLM, SamplingParams
from stepladder.launch.private_ray import PrivateRay
from tests.cluster.jobs import Job, eventually, stream_all, submit
from tests.cluster.models import write_random

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PROMPTS = [f"prompt number {n}: " + "x" * (3 * n) for n in range(6)]
TOKENS = 250


@pytest.fixture(scope="module")
def job(cluster: PrivateRay, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Two attention ranks, one FFN rank; texts do not depend on who is batched with whom."""
    layout = ("layout=afd", "layout.attention=2", "layout.ffn=1")
    options = ("cluster.hang_seconds=5", "monitor.every_seconds=0.5")
    with submit(cluster, "afd", model, tmp_path_factory.mktemp("run"), *options, layout=layout) as job:
        yield job


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[str]:
    """What the whole model says, in one process."""
    llm = LLM(str(model), device="cpu", kv_tokens=8192)
    texts = []
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0 if index % 2 else 0.8, seed=index, ignore_eos=True)
        texts.append(llm.generate([prompt], params)[0].text)
    return texts


def texts(job: Job, strike: Callable[[], None] = lambda: None) -> list[str]:
    asked = [
        {"prompt": prompt, "temperature": 0.0 if index % 2 else 0.8, "seed": index}
        for index, prompt in enumerate(PROMPTS)
    ]
    return stream_all(job, asked, TOKENS, strike)


def counters(job: Job) -> dict[str, dict[str, float]]:
    report = ray.get(job.actor("controller").report.remote(), timeout=30)
    return report["engines"] | report["pools"]


def test_the_texts_of_the_whole_model(job: Job, wanted: list[str]) -> None:
    assert texts(job) == wanted
    eventually(lambda: all(counters(job)[name]["steps"] > 0 for name in ("engine-0", "engine-1", "ffn")))


def test_a_killed_ffn_rank_costs_time_only(job: Job, wanted: list[str]) -> None:
    """The engines live on: nothing is replayed, the step that was under way is completed by the next pool."""
    before = [job.generation_of(name) for name in ("engine-0", "engine-1", "ffn")]
    place = job.rank(0, "ffn", 1)
    assert texts(job, lambda: os.kill(place.pid, signal.SIGKILL)) == wanted
    after = [job.generation_of(name) for name in ("engine-0", "engine-1", "ffn")]
    assert after == [before[0], before[1], before[2] + 1]
    eventually(lambda: job.phase() == "ready", job.phase)


def test_a_killed_attention_rank_costs_the_others_nothing(job: Job, wanted: list[str]) -> None:
    before = [job.generation_of(name) for name in ("engine-0", "engine-1", "ffn")]
    place = job.rank(0, "engine-1", 1)
    assert texts(job, lambda: os.kill(place.pid, signal.SIGKILL)) == wanted
    eventually(lambda: job.phase() == "ready", job.phase)
    after = [job.generation_of(name) for name in ("engine-0", "engine-1", "ffn")]
    assert after == [before[0], before[1] + 1, before[2]]


def test_the_pool_is_adopted_with_the_engines(job: Job, wanted: list[str]) -> None:
    before = [job.generation_of(name) for name in ("engine-0", "engine-1", "ffn")]
    (controller,) = job.cluster.processes("ray::ControllerActor")
    assert texts(job, controller.kill) == wanted
    eventually(lambda: job.phase() == "ready", job.phase)
    assert before == [job.generation_of(name) for name in ("engine-0", "engine-1", "ffn")]


def test_a_schedule_that_does_not_fit_is_one_sentence(cluster: PrivateRay, model: Path, tmp_path: Path) -> None:
    """What only the checkpoint can tell comes from the ranks."""
    standard = write_random(tmp_path)
    with (
        pytest.raises(SystemExit, match=r"layout\.schedule is ladder, but this checkpoint's wiring is 'standard'"),
        submit(cluster, "unfit", standard, tmp_path / "run", layout=("layout=afd", "layout.schedule=ladder")),
    ):
        pass
