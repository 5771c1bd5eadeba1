"""Whatever fails where a drafter learns: sixteen streams go on with the same texts, and one line of a log says what it
was."""

import resource
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.state import get_log, list_actors

from stepladder import LLM, SamplingParams
from stepladder.cluster.drafter_evidence import LEAST
from stepladder.launch.private_ray import PrivateRay
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.speculation.head.files import WEIGHTS, Head
from stepladder.workers.speculation.learning.versions import Versions
from tests.cluster.jobs import eventually
from tests.cluster.test_online_learning import DEMO, deployed, prompt, words_left

STREAMS, TOKENS, LONG = 16, 64, 192
SOON = 150.0  # seconds: the trainer takes what time the others leave, and the machine may have others still


class Streams:
    """Sixteen at once: every other one is greedy, the others have seeds and temperature 1."""

    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=90)
        self._lengths, self._texts = list[int](), list[str]()

    @property
    def requests(self) -> int:
        """So far."""
        return len(self._texts)

    def ask(self, tokens: int = TOKENS, strike: Callable[[], object] = lambda: None) -> None:
        """`strike` happens while all of them are under way."""
        first, under_way = self.requests, threading.Barrier(STREAMS, strike, timeout=60)
        with ThreadPoolExecutor(STREAMS) as pool:
            numbers = range(first, first + STREAMS)
            self._texts += pool.map(lambda number: self._text(number, tokens, under_way), numbers)
        self._lengths += [tokens] * STREAMS

    def check(self) -> None:
        """The texts are those of plain decoding."""
        prompts = [prompt(number) for number in range(self.requests)]
        params = [
            SamplingParams(max_tokens=tokens, temperature=float(number % 2), seed=number, ignore_eos=True)
            for number, tokens in enumerate(self._lengths)
        ]
        plain = LLM(str(DEMO), "cpu").generate(prompts, params)
        assert [one.text for one in plain] == self._texts

    def _text(self, number: int, tokens: int, under_way: threading.Barrier) -> str:
        chunks = self._client.completions.create(
            model="demo", prompt=prompt(number), max_tokens=tokens, seed=number, temperature=float(number % 2),
            top_p=1.0, stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = ""
        for at, chunk in enumerate(chunks):
            if at == 1:
                under_way.wait()
            text += chunk.choices[0].text
        return text


class Learner:
    """The deployment, as its controller tells of it, and its versions on the disk."""

    def __init__(self, controller: ActorHandle, run_dir: Path, cluster: PrivateRay) -> None:
        self._controller, self.cluster = controller, cluster
        self.folder = run_dir / "drafter"
        self._versions = Versions(self.folder, keep=1000)

    def report(self) -> dict[str, Any]:
        """While Ray starts the controller again, it is waited for."""
        found = list[dict[str, Any]]()

        def answers() -> bool:
            with suppress(RayError):
                found.append(ray.get(self._controller.report.remote(), timeout=30))
            return bool(found)

        eventually(answers)
        return found[-1]

    @property
    def drafter(self) -> dict[str, Any]:
        found: dict[str, Any] = self.report()["drafter"]
        return found

    @property
    def engine(self) -> dict[str, Any]:
        """As rank 0 has told the controller; nothing while it starts."""
        found: dict[str, Any] = self.report()["engines"]["engine-0"]
        return found

    def order(self, order: str, version: int | None = None) -> dict[str, Any]:
        """As `ctl drafter` gives it; what has come of it."""
        done: dict[str, Any] = ray.get(self._controller.drafter.remote(order, version))
        return done

    def pause(self) -> None:
        """Nothing is taught any more when it returns."""
        self.order("pause")
        eventually(lambda: not self.drafter["lease"]["lease_open"], lambda: self.drafter)

    def has(self, version: int) -> bool:
        """Whether the engine has told that it drafts with it."""
        return bool(self.engine.get("drafter_version") == version and self.report()["phase"] == "ready")

    def rank(self, group: str) -> ActorHandle:
        return ray.get_actor(f"learner/{self.report()['generations'][group]}/{group}/0")

    def process(self, group: str) -> psutil.Process:
        return psutil.Process(ray.get(self.rank(group).where.remote()).pid)

    def published(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())

    def read(self, number: int) -> Head:
        return self._versions.read(number, DEMO, ModelSpec.load(DEMO))

    def plant(self, head: Head) -> int:
        return self._versions.publish(replace(head, manifest=replace(head.manifest, parent=self.published()[-1])))


def drafts_with(engine: ActorHandle) -> int:
    """What it has in this moment, whatever the controller has heard."""
    version: int = ray.get(engine.ping.remote()).figures.engine.drafter_version
    return version


@pytest.fixture(scope="module", autouse=True)
def no_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For W&B, in a cluster that starts later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("none") / "netrc"))
        yield


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_whatever_fails(cluster: PrivateRay, tmp_path: Path) -> None:
    secret = secrets.token_hex(32)
    options = {"candidate_every": 4, "held_out": 2, "ring_mb": 1.0}
    with deployed(tmp_path, secret, kind="head", wandb="online", **options) as (controller, url):
        learner, streams = Learner(controller, tmp_path, cluster), Streams(url)
        full_disk(learner, streams)
        controller_killed_between_publish_and_swap(learner, streams)
        learner.pause()
        for taken in (False, True):
            rank_killed_during_swap(learner, streams, taken)
        corrupt_version(learner, streams)
        worse_version(learner, streams)
        ring_overflows(learner, streams)
        assert not list(learner.folder.glob("**/*.partial")) and words_left(secret)
        check_logs()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    streams.check()
    assert not words_left(secret)


def check_logs() -> None:
    """One line for each failure; of what lasts, once in the life of a process."""
    [[line]] = logged("controller", "W&B")
    assert "W&B in mode online does not start" in line and "the run is offline" in line
    [[line]] = logged("engine-0", "is not taken")
    assert "has another hash than drafter.json says; the file is damaged" in line
    lives = logged("engine-0", "more answers wait to be learnt from than the ring holds: 1 MiB (train.ring_mb)")
    assert lives and all(len(lines) == 1 for lines in lives)
    [lines] = logged("trainer", "was not published")
    assert all(line.endswith("cannot be written: File too large; the live version stays") for line in lines)


def logged(name: str, words: str) -> list[list[str]]:
    """The lines that say so of each actor whose name has `name` in it, ended or not, where there are any."""
    lives = list[list[str]]()
    for actor in list_actors(limit=1000):
        if name in actor.name:
            text = "".join(get_log(actor_id=actor.actor_id, suffix="err", tail=2000))
            lives.append([line for line in text.splitlines() if words in line])
    return [lines for lines in lives if lines]


def full_disk(learner: Learner, streams: Streams) -> None:
    """For the trainer: it says so, learns on, and has left nothing. Files of more bytes than so are refused, which is
    less than a version's weights have and more than a log."""
    eventually(lambda: learner.drafter["trainer"], learner.report, SOON)
    trainer = learner.process("trainer")
    before = trainer.rlimit(resource.RLIMIT_FSIZE)
    trainer.rlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    eventually(lambda: streams.ask() or learner.drafter["trainer"]["candidates"], learner.report, SOON)
    found = learner.report()
    assert found["phase"] == "ready" and found["drafter"]["live"] is None and found["generations"]["trainer"] == 1
    assert not found["drafter"]["trainer"]["refused_candidates"], "it would have been published"
    assert {path.name for path in learner.folder.iterdir()} == {"given"}
    steps = found["drafter"]["trainer"]["learning_steps"]
    eventually(lambda: streams.ask() or learner.drafter["trainer"]["learning_steps"] > steps, learner.report, SOON)
    trainer.rlimit(resource.RLIMIT_FSIZE, before)


def controller_killed_between_publish_and_swap(learner: Learner, streams: Streams) -> None:
    """At the first version that there is."""
    (controller,) = learner.cluster.processes("ray::ControllerActor")
    engine, over = learner.rank("engine-0"), threading.Event()

    def strike() -> int:
        while not (numbers := learner.published()) and not over.wait(0.001):
            pass
        controller.kill()
        assert not drafts_with(engine), "it was told before the controller died"
        return numbers[0]

    with ThreadPoolExecutor(1) as pool:
        struck = pool.submit(strike)
        try:
            eventually(lambda: streams.ask() or struck.done(), learner.published, SOON)
        finally:
            over.set()
    number = struck.result()
    eventually(lambda: not controller.is_running())
    eventually(lambda: streams.ask() or learner.engine.get("drafter_version", 0) >= number, learner.report, SOON)
    assert learner.drafter["lines"][0][1].startswith("published ")


def rank_killed_during_swap(learner: Learner, streams: Streams, taken: bool) -> None:
    """Rank 0, when it is told of a version or, `taken`, when it has it and the controller does not know."""
    number = learner.plant(learner.read(learner.drafter["live"]))
    before, process = learner.report()["generations"]["engine-0"], learner.process("engine-0")
    engine = learner.rank("engine-0")

    def strike() -> None:
        assert learner.order("pin", number)["behind"] == ["engine-0"]
        if taken:
            eventually(lambda: drafts_with(engine) == number)
        process.send_signal(signal.SIGKILL)

    streams.ask(LONG, strike)
    eventually(lambda: learner.has(number), learner.report, SOON)
    assert learner.report()["generations"]["engine-0"] == before + 1


def corrupt_version(learner: Learner, streams: Streams) -> None:
    """The engine keeps what it has; when the order is undone, so does everybody."""
    live = learner.drafter["live"]
    number = learner.plant(learner.read(live))
    weights = learner.folder / str(number) / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    learner.order("pin", number)
    refused = f"engine-0 cannot take {number}, which is pinned: "
    eventually(lambda: learner.drafter["lines"][-1][1].startswith(refused), lambda: learner.drafter["lines"])
    said = learner.drafter["lines"][-1][1]
    assert said.endswith("the file is damaged") and "\n" not in said
    streams.ask()
    assert drafts_with(learner.rank("engine-0")) == live and learner.report()["phase"] == "ready"
    said = learner.order("resume")["said"]
    assert said.startswith("resumed by order; rolled back to ") and said.endswith(f"; {number} is rejected")
    learner.pause()
    back = learner.drafter["live"]
    assert back < number
    eventually(lambda: learner.has(back), learner.report)


def worse_version(learner: Learner, streams: Streams) -> None:
    """Forced in as if it had been published: it is live, and is not pinned."""
    good = learner.drafter["live"]
    eventually(lambda: streams.ask() or learner.engine["drafter_guesses"] > LEAST, learner.report, SOON)
    number = learner.plant(spoilt(learner.read(good)))
    before = streams.requests
    learner.order("pin", number)
    learner.order("resume")
    learner.pause()
    assert learner.drafter["live"] == number and learner.drafter["pinned"] is None
    eventually(lambda: streams.ask() or number in learner.drafter["rejected"], learner.report, SOON)
    assert streams.requests - before <= 200
    assert learner.drafter["live"] == good and "acceptance" in learner.drafter["rejected"][number]
    eventually(lambda: learner.has(good), learner.report)


def spoilt(head: Head) -> Head:
    net = deepcopy(head.net)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.nn.init.normal_(net.linear.weight)
    return replace(head, net=net)


def ring_overflows(learner: Learner, streams: Streams) -> None:
    """While a trainer that was killed in its work starts again."""
    learner.order("resume")
    streams.ask()
    eventually(lambda: learner.drafter["lease"]["lease_open"], learner.report, SOON)
    learner.process("trainer").send_signal(signal.SIGKILL)
    eventually(lambda: streams.ask() or learner.engine["dropped_tokens"] > 0, learner.report, SOON)

    def goes_on() -> bool:
        found = learner.report()
        return bool(found["generations"]["trainer"] > 1 and found["drafter"]["trainer"] and found["phase"] == "ready")

    eventually(goes_on, learner.report, SOON)
