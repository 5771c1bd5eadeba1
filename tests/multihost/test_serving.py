"""A Ray node on each of two hosts, and one tensor-parallel group across them, submitted as a Ray job."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import psutil
import pytest

from stepladder import LLM, SamplingParams
from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.hosts import Host, Hosts
from stepladder.launch.deployed import ready
from stepladder.launch.private_ray import PrivateRay, RayNode
from stepladder.launch.where import IMPORTED_FROM as ROOT
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import wiring
from stepladder.workers.text.tokenizer import Tokenizer
from tests.cluster.jobs import eventually
from tests.multihost.ask import Answer
from tests.multihost.switch import cut_off, join, traffic
from tests.multihost.watch import Watch

pytestmark = [pytest.mark.ray, pytest.mark.multihost, pytest.mark.timeout(240)]

NAME = "across"
MODEL = ROOT / "launch/demo_model"
HANG_SECONDS = 5
OPTIONS = (
    "model=demo cluster=two_nodes cluster.device=cpu cluster.strategy=STRICT_SPREAD engine.threads=1 "
    "engine.dtype=float32 kv.tokens=4096 monitor=jsonl "
    f"gateway.host=0.0.0.0 gateway.resource=node:__internal_head__ name={NAME} cluster.hang_seconds={HANG_SECONDS}"
)
PROMPTS = [
    (ROOT / "launch/quickstart.py").read_text()[:2400],
    'def read_lines(path):\n    """Return the lines of a file."""\n    ',
    "import argparse\nimport sys\n\ndef main():\n    parser = argparse.ArgumentParser()\n    ",
]
MAX_TOKENS, LONG = 48, 250


@dataclass
class Deployment:
    """`nodes` are the Ray nodes, host by host; the first has the head, the controller and the gateway."""

    hosts: Hosts
    ray: PrivateRay
    nodes: list[RayNode]
    stack: ExitStack
    url: str = ""

    def ask(self, host: Host, prompt: str, max_tokens: int = MAX_TOKENS) -> str:
        return Answer(host, self.url, prompt, max_tokens).text()

    def ranks(self) -> list[int]:
        """How many ranks run on each host, by their network namespaces."""
        ranks = {p.pid for p in self.actors("Rank")}
        return [len(ranks & set(netns.processes(host.namespace))) for host in self.hosts]

    def actors(self, *kinds: str) -> list[psutil.Process]:
        return [p for node in self.nodes for kind in kinds for p in node.processes(f"ray::{kind}Actor")]

    def start_node(self, index: int) -> None:
        """A Ray node on a host, as a supervisor of that host does when there is none."""
        host = self.hosts[index]
        self.nodes[index:] = [self.stack.enter_context(self.ray.joined(1, host.address, host.prefix))]

    def serve(self, run_dir: Path, layout: str) -> None:
        command = ["python", "-m", "launch.serve", *OPTIONS.split(), *layout.split(), f"run_dir={run_dir}"]
        self.ray.job("submit", "--no-wait", "--submission-id", NAME, "--working-dir", str(ROOT), "--", *command)
        self.url = ready(self.ray, NAME)

    def stop(self) -> None:
        self.ray.job("stop", NAME)
        eventually(lambda: not self.actors("Rank", "Gateway", "Controller"))


@contextmanager
def deployed(count: int, run_dir: Path, layout: str = "layout.tp=2", head_cpus: int = 1) -> Iterator[Deployment]:
    """Serving on so many hosts, each with room for one rank, the head's with room for `head_cpus`; in the end nothing
    may be left of the deployment, of Ray, and of the hosts."""
    with Hosts(count) as hosts:
        with ExitStack() as stack:
            ray = stack.enter_context(PrivateRay(head_cpus, address=hosts[0].address, prefix=hosts[0].prefix))
            deployment = Deployment(hosts, ray, [ray], stack)
            for index in range(1, count):
                deployment.start_node(index)
            deployment.serve(run_dir, layout)
            yield deployment
            deployment.stop()
        assert not [p for namespace in hosts.namespaces for p in netns.processes(namespace)]
    assert not [name for name in hosts.namespaces if (netns.FOLDER / name).exists()]


@pytest.fixture(scope="module")
def deployment(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(2, tmp_path_factory.mktemp("run")) as deployment:
        yield deployment


def alone(prompts: list[str], max_tokens: int = MAX_TOKENS) -> list[str]:
    """What the same model answers in one process."""
    llm = LLM(str(MODEL), device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [llm.generate([prompt], params)[0].text for prompt in prompts]


def reduced_bytes(num_tokens: int) -> int:
    """What each of two ranks sends at least so that the partial sums of so many tokens are summed, in fp32."""
    spec = ModelSpec.load(MODEL)
    return len(wiring(spec)) * num_tokens * spec.hidden_size * 4


def test_one_group_on_two_hosts_answers_as_one_process_does(deployment: Deployment) -> None:
    """And its reduces go over the link between the hosts. The client is on the host without the gateway."""
    first, second = deployment.hosts
    assert deployment.ranks() == [1, 1]
    assert not [p for kind in ("Gateway", "Controller") for p in deployment.nodes[1].processes(f"ray::{kind}Actor")]
    before = traffic(second)
    texts = [deployment.ask(second, prompt) for prompt in PROMPTS]
    after = traffic(second)
    assert texts == alone(PROMPTS) and len(set(texts)) == len(PROMPTS)
    tokenizer = Tokenizer(MODEL)
    least = reduced_bytes(sum(len(tokenizer.encode(prompt, True)) + MAX_TOKENS - 1 for prompt in PROMPTS))
    assert min(after.sent - before.sent, after.received - before.received) >= least > 10e6
    assert first.address in deployment.url


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_a_while_costs_time_only(deployment: Deployment) -> None:
    """A request that is under way ends as if nothing had happened. Ray has not even missed the host."""
    first, second = deployment.hosts
    undisturbed = deployment.ask(first, PROMPTS[1], LONG)
    with Watch(first, deployment.ray.env, NAME) as watch:
        before = watch.until(lambda seen: seen.phase == "ready", 30)
        answer = Answer(first, deployment.url, PROMPTS[1], LONG)
        answer.begun()
        cut = monotonic()
        cut_off(second)
        noticed = watch.until(lambda seen: seen.phase == "mending", 30)
        assert HANG_SECONDS - 1 < noticed.at - cut < HANG_SECONDS + 10 and "0 of 1 engines serve" in noticed.detail
        join(second)
        back = watch.until(lambda seen: seen.phase == "ready", 90)
        print(f"noticed after {noticed.at - cut:.1f} s, ready {back.at - noticed.at:.1f} s after it was joined again")
    assert (back.generation, back.nodes) == (before.generation + 1, 2) and deployment.nodes[1].runs
    assert answer.text() == undisturbed == deployment.ask(second, PROMPTS[1], LONG)
    eventually(lambda: deployment.ranks() == [1, 1], deployment.ranks)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_host_that_ray_has_given_up_is_used_again_once_it_has_a_ray_node(deployment: Deployment) -> None:
    """Ray gives it up after a minute; its node then ends itself as soon as it hears that."""
    first, second = deployment.hosts
    with Watch(first, deployment.ray.env, NAME) as watch:
        before = watch.until(lambda seen: seen.phase == "ready", 30)
        cut = monotonic()
        cut_off(second)
        noticed = watch.until(lambda seen: seen.phase == "mending", 30)
        lost = watch.until(lambda seen: seen.nodes == 1, 150)
        assert lost.at - cut > HANG_SECONDS and lost.phase == "mending" and "0 of 1 engines serve" in lost.detail
        join(second)
        joined = monotonic()
        eventually(lambda: not deployment.nodes[1].runs, seconds=120)
        ended = monotonic()
        deployment.start_node(1)
        up = monotonic()
        back = watch.until(lambda seen: seen.phase == "ready", 90)
        print(
            f"noticed after {noticed.at - cut:.1f} s, by Ray after {lost.at - cut:.1f} s; its node ended "
            f"{ended - joined:.1f} s after it was joined again, ready {back.at - up:.1f} s after a new one was up"
        )
    assert back.generation > before.generation and deployment.ranks() == [1, 1]
    assert deployment.ask(second, PROMPTS[1]) == alone(PROMPTS[1:2])[0]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_spare_host_takes_over_for_one_that_is_cut_off(possible: None, tmp_path: Path) -> None:
    """Long before Ray gives that one up."""
    with deployed(3, tmp_path) as deployment, Watch(deployment.hosts[0], deployment.ray.env, NAME) as watch:
        before = watch.until(lambda seen: seen.phase == "ready", 30)
        lost = next(index for index in (1, 2) if deployment.ranks()[index])
        answer = Answer(deployment.hosts[0], deployment.url, PROMPTS[1], LONG)
        answer.begun()
        cut = monotonic()
        cut_off(deployment.hosts[lost])
        noticed = watch.until(lambda seen: seen.phase == "mending", 30)
        back = watch.until(lambda seen: seen.phase == "ready", 50)
        print(f"noticed after {noticed.at - cut:.1f} s, ready after {back.at - cut:.1f} s")
        assert (back.generation, back.nodes) == (before.generation + 1, 3)
        assert answer.text() == deployment.ask(deployment.hosts[0], PROMPTS[1], LONG)
        join(deployment.hosts[lost])
        expected = [int(index != lost) for index in range(3)]
        eventually(lambda: deployment.ranks() == expected, deployment.ranks, seconds=90)
