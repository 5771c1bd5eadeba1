"""A deployment whose drafter learns from what is answered: versions become live, texts stay plain decoding's."""

import json
import os
import secrets
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray.actor import ActorHandle

from stepladder import LLM, SamplingParams
from stepladder.cluster.config import ClusterConfig, Deployment, ModelConfig, MonitorConfig
from stepladder.launch import ctl
from stepladder.launch.private_ray import PrivateRay
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.learning.busy_word import FOLDER, word_name
from stepladder.workers.speculation.learning.config import LearnConfig
from stepladder.workers.speculation.learning.lease_trace import (
    END,
    LOAD,
    MICRO_BATCH,
    delays,
    read_trace,
    trace_path,
)
from tests.cluster.jobs import controlled, eventually

DEMO = Path(__file__).resolve().parents[2] / "launch" / "demo_model"
TOKENS, STREAMS = 64, 4
BEGINNINGS = ("<table>\n <tr>", "0x00 0x01", "Name | Age\n-----|----\n", "* item\n* item", "<ul>\n  <li>")


def prompt(number: int) -> str:
    return f"{BEGINNINGS[number % len(BEGINNINGS)]} {number}"


def deployed(
    run_dir: Path, secret: str, kind: str = "hybrid", wandb: str = "disabled", **train: Any
) -> AbstractContextManager[tuple[ActorHandle, str]]:
    """Called `learner`. train: options of learning."""
    learn = {"candidate_every": 12, "drafted": 1024, "inner": 128, **train}
    wanted = Deployment(
        name="learner",
        run_dir=str(run_dir),
        secret=secret,
        model=ModelConfig(path=str(DEMO), name="demo"),
        engine=EngineConfig(threads=1),
        kv=KvConfig(tokens=8192),
        speculate=SpeculateConfig(kind=kind),
        train=LearnConfig(kind="online", **learn),
        cluster=ClusterConfig(hang_seconds=5),
        monitor=MonitorConfig(wandb=wandb),
        detach=True,
    )
    return controlled(wanted)


def words_left(secret: str) -> list[str]:
    """In shared memory, of any life of this deployment's engine; those of other deployments are none of its."""
    names = (word_name(f"learner/{life}/engine-0", secret) for life in range(1, 20))
    return [name for name in names if (FOLDER / name).exists()]


def ordered(capsys: pytest.CaptureFixture[str], live: int) -> None:
    """A person has a say in it."""
    capsys.readouterr()

    def order(*words: str, code: int = ctl.OK) -> str:
        assert ctl.main(["drafter", *words, "name=learner"]) == code
        told = capsys.readouterr()
        return told.out if code == ctl.OK else told.err

    assert order("pin", f"version={live}") == f"pinned {live} by order; it stays live until learning is resumed\n"
    assert f"version {live} is live" in (shown := order("list")) and f"{live} is pinned" in shown
    (row,) = [one for one in json.loads(order("list", "format=json"))["versions"] if one["number"] == live]
    assert row["bytes"] > 1e5 and row["scores"]["overlap"] > 0 and row["window"]["tokens"] > 0
    assert order("rollback", code=ctl.ABSENT).startswith(f"stepladder: version {live} of the drafter is pinned")
    assert "there is no version 10000 of the drafter" in order("pin", "version=10000", code=ctl.ABSENT)
    assert order("pause").startswith("paused by order") and order("resume").startswith("resumed by order")


class Traffic:
    """Requests with a seed of their own each, some at once; texts by number."""

    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self._numbers, self.texts = count(), dict[int, str]()

    def ask(self, requests: int) -> None:
        numbers = [next(self._numbers) for _ in range(requests)]
        with ThreadPoolExecutor(STREAMS) as pool:
            self.texts |= zip(numbers, pool.map(self._text, numbers), strict=True)

    def _text(self, number: int) -> str:
        answer = self._client.completions.create(
            model="demo", prompt=prompt(number), max_tokens=TOKENS, temperature=1.0, top_p=1.0, seed=number
        )
        return answer.choices[0].text

    def check(self) -> None:
        """The texts are those of plain decoding."""
        llm = LLM(str(DEMO), "cpu")
        params = [SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=number) for number in self.texts]
        plain = llm.generate([prompt(number) for number in self.texts], params)
        assert [one.text for one in plain] == list(self.texts.values())


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_it_learns_while_it_serves(cluster: PrivateRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions become live, engines draft with them, a killed trainer goes on from the live one, and what it leaves is
    whole. No text changes, and nothing of it is left behind."""
    secret = secrets.token_hex(32)
    with deployed(tmp_path, secret) as (controller, url):
        traffic = Traffic(url)

        def report() -> dict[str, Any]:
            found: dict[str, Any] = ray.get(controller.report.remote())
            return found

        def taken(above: int) -> bool:
            """Whether a version above this one drafts in the engine, after some more requests."""
            traffic.ask(8)
            found = report()
            engine = found["engines"]["engine-0"]
            return (found["drafter"]["live"] or 0) > above and engine.get("drafter_version", 0) > above

        eventually(lambda: taken(0), report, seconds=120)
        first = report()["drafter"]["live"]
        place = ray.get(ray.get_actor("learner/1/trainer/0").where.remote())
        assert os.sched_getscheduler(place.pid) == os.SCHED_IDLE
        os.kill(place.pid, signal.SIGKILL)

        def judges_again() -> bool:
            """Whether another trainer has learnt enough to judge by; whether it finds something better is luck."""
            traffic.ask(8)
            found = report()
            return found["generations"]["trainer"] > 1 and found["drafter"]["trainer"].get("candidates", 0) > 0

        eventually(judges_again, report, seconds=120)
        found = report()
        assert found["drafter"]["live"] >= first
        lease = found["drafter"]["lease"]
        over = sum(lease[f"lease_{how}"] for how in ("revoked", "expired", "returned", "lost"))
        assert lease["lease_overrun_micro_batches"] <= over and found["phase"] == "ready", "one that was under way"
        engine = found["engines"]["engine-0"]
        assert engine["drafter_guesses"] > 0 and engine["captured_tokens"] > 0
        with capsys.disabled():
            print("\n".join(line for _, line in found["drafter"]["lines"]))
        ordered(capsys, found["drafter"]["live"])
        versions = tmp_path / "drafter"
        assert {path.name for path in versions.glob("*.partial")} == set()
        assert words_left(secret) == [word_name("learner/1/engine-0", secret)]
    traffic.check()
    rows = read_trace(trace_path(tmp_path / "drafter", 0))
    assert MICRO_BATCH in {row.what for row in rows}, "the trainer has left one of its last life"
    assert all(delay.micro_batches <= 1 for after in (END, LOAD) for delay in delays(rows, after))
    assert not words_left(secret)
