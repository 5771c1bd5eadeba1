"""The whole system on a real Ray: job submission, streaming, every kind of death, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import httpx
import openai
import psutil
import pytest
import ray
import requests
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stepladder.cluster import placement
from stepladder.launch import ctl
from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.where import IMPORTED_FROM as ROOT
from stepladder.workers.actors import RankActor
from tests.cluster.collector import collecting
from tests.cluster.jobs import Job, eventually, submit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PROMPTS = [f"prompt number {n}: " + "x" * (3 * n) for n in range(6)]


@pytest.fixture(scope="module")
def job(cluster: PrivateRay, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    options = ("monitor.every_seconds=0.5", "cluster.hang_seconds=5")
    with submit(cluster, "tests", model, tmp_path_factory.mktemp("run"), *options) as job:
        yield job


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> list[str]:
    """What each prompt is continued with when nothing happens."""
    return [complete(job, index) for index in range(len(PROMPTS))]


def complete(job: Job, index: int, begun: Callable[[], None] = lambda: None, request_id: str | None = None) -> str:
    """One streamed completion, greedy or seeded; `begun` is called after its tenth chunk."""
    headers = {"X-Request-Id": request_id} if request_id else {}
    temperature = 0.0 if index % 2 else 0.8
    options = {"ignore_eos": True}
    chunks = job.client.completions.create(
        model="tiny", prompt=PROMPTS[index], max_tokens=250, temperature=temperature, seed=index, stream=True,
        extra_body=options, extra_headers=headers,
    )  # fmt: skip
    text = ""
    for number, chunk in enumerate(chunks):
        text += chunk.choices[0].text
        if number == 10:
            begun()
    return text


def reachable(job: Job) -> bool:
    """Whether the gateway is there and ready; it refuses connections while it is started again."""
    try:
        return job.ready()
    except requests.ConnectionError:
        return False


def disturbed(job: Job, strike: Callable[[], None]) -> list[str]:
    """All prompts at once; `strike` happens when all of them are under way: one that comes later may find no engine."""
    under_way = threading.Barrier(len(PROMPTS), strike, timeout=60)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda index: complete(job, index, lambda: under_way.wait()), range(len(PROMPTS))))


def test_serves_what_it_was_asked_to(job: Job, undisturbed: list[str]) -> None:
    assert [m.id for m in job.client.models.list()] == ["tiny"]
    assert len(set(undisturbed)) == len(PROMPTS) and all(undisturbed)
    chat = job.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0
    )
    assert chat.usage is not None and chat.usage.completion_tokens <= 5
    assert disturbed(job, lambda: None) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_time_only(job: Job, undisturbed: list[str], rank: int) -> None:
    before, place = job.generation, job.rank(rank)
    assert disturbed(job, lambda: os.kill(place.pid, signal.SIGKILL)) == undisturbed
    assert job.generation == before + 1
    eventually(job.ready)


def test_an_engine_that_cannot_come_back_is_tried_until_it_can(
    job: Job, model: Path, undisturbed: list[str], tmp_path: Path
) -> None:
    """Its files were broken under it: the deployment waits for whole ones and says so, in one line."""
    weights, place = model / "model.safetensors", job.rank(0)
    whole = weights.read_bytes()

    def put(content: bytes) -> None:
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(weights)  # whoever reads the old file goes on reading it

    def strike() -> None:
        put(whole[:1000])
        os.kill(place.pid, signal.SIGKILL)
        why = rf"0 of 1 engines serve; engine-0: {weights} cannot be read: .*\(on node {place.host}\); trying again"
        eventually(lambda: re.fullmatch(why, job.detail()), job.detail)
        put(whole)

    assert disturbed(job, strike) == undisturbed
    eventually(job.ready)


def test_a_stopped_rank_is_found_and_killed(job: Job, undisturbed: list[str]) -> None:
    before, place = job.generation, job.rank(0)
    assert disturbed(job, lambda: os.kill(place.pid, signal.SIGSTOP)) == undisturbed
    assert job.generation == before + 1
    eventually(lambda: not psutil.pid_exists(place.pid))
    eventually(job.ready)


def test_a_killed_gateway_is_back_and_a_retry_continues(job: Job, undisturbed: list[str]) -> None:
    """Its streams end at once; under the same X-Request-Id, what ran on in the engine is given out."""

    def generated() -> int:
        actors = [job.actor(f"tests/{job.generation}/engine-0/{rank}") for rank in range(2)]
        figures = [sign.figures for sign in ray.get([a.ping.remote() for a in actors])]
        return max(one.values().get("generation_tokens", 0) for one in figures if one)

    before, url = generated(), job.status().url
    (gateway,) = job.cluster.processes("ray::GatewayActor")
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        complete(job, 0, gateway.kill, request_id="again")
    eventually(lambda: reachable(job))
    assert complete(job, 0, request_id="again") == undisturbed[0]
    assert job.status().url == url and generated() - before == 250


@pytest.mark.parametrize("strike", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_controller_is_not_noticed(job: Job, undisturbed: list[str], strike: signal.Signals) -> None:
    """Ray starts a killed one again; one that hangs is killed by the gateway first."""
    before, place = job.generation, job.rank(0)
    (controller,) = job.cluster.processes("ray::ControllerActor")
    assert disturbed(job, lambda: controller.send_signal(strike)) == undisturbed
    eventually(lambda: not controller.is_running())
    eventually(lambda: job.phase() == "ready", job.phase)
    assert (job.generation, job.rank(0).pid) == (before, place.pid)


def test_figures_are_logged(job: Job, undisturbed: list[str]) -> None:
    def rows() -> list[dict[str, float]]:
        return [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]

    eventually(lambda: any(0 <= row.get("engine/reduce_hidden_share", -1) <= 1 for row in rows()), rows)
    assert any(row.get("serve/ttft_ms_p50", 0) > 0 for row in rows())
    assert list(job.run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def test_ctl_shows_the_deployment(job: Job, undisturbed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    eventually(lambda: "serve/tokens_per_s" in ray.get(job.actor("controller").report.remote())["figures"])
    assert ctl.main(["status"]) == ctl.OK
    shown = capsys.readouterr().out
    assert f"tests  ready: serving tiny at {job.url}" in shown and "tokens/s" in shown
    assert ctl.main(["status", "name=tests", "format=json"]) == ctl.OK
    report = json.loads(capsys.readouterr().out)
    assert report["engines"]["engine-0"]["generation"] == job.generation and report["url"] == job.url
    assert report["engines"]["engine-0"]["steps"] > 0
    assert ctl.main(["status", "name=other"]) == ctl.ABSENT
    assert capsys.readouterr().err == "stepladder: there is no deployment named 'other'; this Ray cluster has tests\n"
    assert ctl.main(["drafter", "list"]) == ctl.ABSENT
    refused = "stepladder: this deployment does not train a drafter; serve with train=online\n"
    assert capsys.readouterr().err == refused


def test_ctl_prints_logs(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(["logs", "name=tests", "actor=controller", "lines=5"]) == ctl.OK
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 10 and all(line.startswith("controller | ") for line in lines)
    assert any("INFO stepladder.cluster." in line for line in lines)
    assert ctl.main(["logs", "name=tests", "actor=typo"]) == ctl.ABSENT
    said = capsys.readouterr().err
    assert said.startswith("stepladder: no actor of tests has 'typo' in its name; there are controller, tests/")
    assert said.count("\n") == 1


@pytest.mark.parametrize("words", ["status", "status format=json", "logs lines=1000", "logs follow=true"])
def test_whoever_stops_reading_ends_ctl_without_a_word(job: Job, words: str) -> None:
    """As `ctl status | head -0` does."""
    command = [sys.executable, "-m", "launch.ctl", *words.split(), "name=tests"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        env = {**os.environ, **job.cluster.env}
        done = subprocess.run(command, env=env, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (ctl.CUT_OFF, "")


def test_ctl_drains_and_resumes(job: Job, undisturbed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is in flight goes on to its end; what comes later is refused; resuming undoes it."""
    with ThreadPoolExecutor(1) as pool:
        drained: list[Future[int]] = []
        text = complete(job, 0, lambda: drained.append(pool.submit(ctl.main, ["drain", "seconds=60"])))
        assert text == undisturbed[0]
        assert drained[0].result() == ctl.OK
    assert "tests is drained" in capsys.readouterr().out
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        complete(job, 1)
    assert not job.ready() and ctl.main(["status"]) == ctl.NOT_READY
    assert ctl.main(["resume"]) == ctl.OK
    eventually(job.ready)
    assert complete(job, 1) == undisturbed[1]


def test_nothing_is_left_after_ctl_stop(job: Job) -> None:
    """The last test of this module's `job`."""
    command = [sys.executable, "-m", "launch.ctl", "stop", "name=tests", "seconds=60"]
    done = subprocess.run(command, env=job.cluster.env, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (ctl.OK, "") and done.stdout.endswith("tests is gone\n")
    eventually(lambda: not job.remains(), job.remains)
    eventually(lambda: "succeeded" in job.cluster.job("status", "tests"))


def test_ctl_says_what_a_cluster_without_a_deployment_needs(
    cluster: PrivateRay, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ([], ["name=other"]):
        assert ctl.main(["status", *name]) == ctl.ABSENT
        assert capsys.readouterr().err == (
            "stepladder: this Ray cluster has no deployment; `stepladder serve` makes one\n"
        )


def test_a_cache_larger_than_memory_is_refused_at_its_first_start(
    cluster: PrivateRay, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as failed:
        submit(cluster, "large", model, tmp_path, "kv.tokens=100000000000").__enter__()
    why = r"stepladder failed: kv.tokens is 100000000000, whose KV cache needs [\d.]+ GB on each of 2 ranks, but there "
    assert re.search(why + r"are [\d.]+ GB free on this machine; set fewer, or null", str(failed.value))
    assert "trying again" not in str(failed.value)
    assert "OOM" not in str(failed.value), "Ray's own guess, where a rank was killed before it could end"


def test_nothing_is_left_after_job_stop(cluster: PrivateRay, model: Path, tmp_path: Path) -> None:
    """Traces that had not been sent yet are sent before. What is in flight goes on to its end, though that takes longer
    than `orphan_seconds` and the engine has to be put back for it."""
    shared = set(os.listdir("/dev/shm"))
    with collecting() as collector:
        options = (f"gateway.otlp_traces_endpoint={collector.url}", "gateway.tokenizer_info=true")
        options += ("cluster.orphan_seconds=5", "gateway.drain_seconds=60")
        with submit(cluster, "stopped", model, tmp_path, *options) as job:
            assert job.remains()
            assert "chat_template" in requests.get(f"{job.url}/tokenizer_info", timeout=10).json()
            text = complete(job, 1, request_id="traced")
            place = job.rank(1)

            def strike() -> None:
                os.kill(place.pid, signal.SIGKILL)
                job.stop()

            assert complete(job, 1, strike) == text
            eventually(lambda: not job.remains(), job.remains)
    (found,) = collector.of("cmpl-traced")
    assert found.attributes["gen_ai.usage.completion_tokens"] == 250
    assert found.attributes["gen_ai.latency.time_in_queue"] > 0
    assert set(os.listdir("/dev/shm")) <= shared


def test_a_driver_that_just_dies_takes_the_deployment_along(cluster: PrivateRay, model: Path, tmp_path: Path) -> None:
    with submit(cluster, "orphaned", model, tmp_path, "cluster.driver_seconds=3") as job:
        (driver,) = cluster.processes("python -m launch.serve name=orphaned")
        driver.kill()
        eventually(lambda: not job.remains(), job.remains)


def test_a_model_that_is_not_there_is_one_sentence(cluster: PrivateRay, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as failed:
        submit(cluster, "missing", Path("/nowhere"), tmp_path).__enter__()
    (line,) = [line for line in str(failed.value).splitlines() if line.startswith("stepladder failed: ")]
    assert re.fullmatch(r"stepladder failed: model.path '/nowhere' is not a directory on .* \(on node [\d.]+\)", line)


def test_ranks_without_a_controller_end_themselves(cluster: PrivateRay) -> None:
    """And their placement group, so that nothing is held for nobody."""
    name = "alone/1/engine-0"
    group = placement.place(name, {"CPU": 1.0}, 1, "PACK", 30, lambda: True)
    options = {"lifetime": "detached", "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
    rank = RankActor.options(name=f"{name}/0", **options).remote(name, 2.0)  # type: ignore[attr-defined]
    process = psutil.Process(ray.get(rank.where.remote()).pid)
    heard_until = monotonic() + 3
    while monotonic() < heard_until:
        ray.get(rank.ping.remote())
    silent = monotonic()
    eventually(lambda: not process.is_running() and not placement.names("alone/"))
    assert monotonic() - silent > 1.5


def test_a_gateway_without_its_resource_is_told(cluster: PrivateRay, model: Path, tmp_path: Path) -> None:
    options = ("cluster.start_seconds=12", "gateway.resource=gpu_room")
    with pytest.raises(SystemExit) as failed:
        submit(cluster, "homeless", model, tmp_path, *options, layout=("layout.tp=1",)).__enter__()
    why = r"gateway.resource is 'gpu_room', but no node of the cluster has the resource 'gpu_room'; nodes have CPU, .*"
    assert re.search(rf"stepladder starting: .*; the gateway: {why} \(waiting up to 12 s for one\)", str(failed.value))
    assert re.search(rf"stepladder failed: {why}; set it to one of these, or to null", str(failed.value))


def test_ranks_without_room_are_told(cluster: PrivateRay, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as failed:
        submit(cluster, "crowded", model, tmp_path, "cluster.start_seconds=12", layout=("layout.tp=6",)).__enter__()
    assert "no room in the cluster yet for ranks: 6 of engine-0 (up to 12 s)" in str(failed.value)
    assert "stepladder failed: the cluster had no room for 6 x {'CPU': 1.0} within 12 s" in str(failed.value)
