"""Attention and FFNs on hosts of their own, submitted as a Ray job: the same API and texts, whoever is cut off."""

import json
import sys
from pathlib import Path
from time import monotonic

import pytest

from stepladder.parallel.spec import ModelSpec
from stepladder.workers.text.tokenizer import Tokenizer
from tests.multihost.ask import Answer
from tests.multihost.switch import cut_off, join, traffic
from tests.multihost.test_serving import (
    HANG_SECONDS,
    LONG,
    MAX_TOKENS,
    MODEL,
    NAME,
    PROMPTS,
    Deployment,
    alone,
    deployed,
)
from tests.multihost.watch import Watch

pytestmark = [pytest.mark.ray, pytest.mark.multihost, pytest.mark.timeout(240)]


def test_attention_and_ffn_on_two_hosts_answer_as_one_process_does(possible: None, tmp_path: Path) -> None:
    """And every layer's rows go over the link between them, to the FFN and back."""
    with deployed(2, tmp_path, "layout=afd layout.attention=1 layout.ffn=1") as deployment:
        second = deployment.hosts[1]
        assert deployment.ranks() == [1, 1]
        before = traffic(second)
        texts = [deployment.ask(second, prompt) for prompt in PROMPTS]
        after = traffic(second)
    assert texts == alone(PROMPTS) and len(set(texts)) == len(PROMPTS)
    spec, tokenizer = ModelSpec.load(MODEL), Tokenizer(MODEL)
    tokens = sum(len(tokenizer.encode(prompt, True)) + MAX_TOKENS - 1 for prompt in PROMPTS)
    least = spec.num_layers * tokens * spec.hidden_size * 4
    assert min(after.sent - before.sent, after.received - before.received) >= least > 5e6


GANGS = ("engine-0", "engine-1", "ffn")
SHORT = PROMPTS[1:]


def generations(run_dir: Path) -> dict[str, int]:
    journal = json.loads((run_dir / "journal.json").read_text())
    return {gang: journal[f"generation of {gang}"] for gang in GANGS}


def host_of(deployment: Deployment, run_dir: Path) -> dict[str, int]:
    """The index of each gang's host."""
    command = [sys.executable, "-m", "tests.multihost.where", NAME]
    command += [f"{gang}={generation}" for gang, generation in generations(run_dir).items()]
    said = deployment.hosts[0].run(command, env=deployment.ray.env, capture_output=True, text=True, check=True).stdout
    index = {host.address: number for number, host in enumerate(deployment.hosts)}
    return {gang: index[address] for gang, address in json.loads(said.splitlines()[-1]).items()}


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("lost", ["engine-1", "ffn"])
def test_a_host_that_is_cut_off_costs_time_only(possible: None, tmp_path: Path, lost: str) -> None:
    """No connection to it ends, nothing comes any more. Without one of two attention hosts every request ends on the
    other; without the FFN host they wait until it is back."""
    run_dir = tmp_path / "run"
    with (
        deployed(4, run_dir, "layout=afd layout.attention=2 layout.ffn=1", head_cpus=0) as deployment,
        Watch(deployment.hosts[0], deployment.ray.env, NAME) as watch,
    ):
        watch.until(lambda seen: seen.phase == "ready", 30)
        host, before = deployment.hosts[host_of(deployment, run_dir)[lost]], generations(run_dir)
        answers = [Answer(deployment.hosts[0], deployment.url, prompt, LONG) for prompt in SHORT]  # one on each engine
        for answer in answers:
            answer.begun()
        cut = monotonic()
        cut_off(host)
        noticed = watch.until(lambda seen: seen.phase == "mending", 40)
        if lost != "ffn":
            texts = [answer.text() for answer in answers]
            ended = monotonic()
        join(host)
        back = watch.until(lambda seen: seen.phase == "ready", 120)
        if lost == "ffn":
            texts = [answer.text() for answer in answers]
            ended = monotonic()
        print(
            f"{lost} noticed after {noticed.at - cut:.1f} s, all answers ended after {ended - cut:.1f} s, "
            f"ready after {back.at - cut:.1f} s"
        )
        assert noticed.at - cut < 2 * HANG_SECONDS + 10
        assert generations(run_dir)[lost] > before[lost]
    assert texts == alone(SHORT, LONG)
