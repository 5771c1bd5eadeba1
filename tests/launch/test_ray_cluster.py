"""Whoever attaches is told within seconds what was tried, what answered and what to set. The clusters are real."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import monotonic

import pytest

from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.ray_cluster import within
from stepladder.launch.where import IMPORTED_FROM as ROOT

COMMANDS = {
    "ctl status": ["-m", "launch.ctl", "status", "seconds=8"],
    "ctl stop": ["-m", "launch.ctl", "stop", "seconds=8"],
    "ctl logs": ["-m", "launch.ctl", "logs", "seconds=8"],
    "serve": ["-m", "launch.serve", "run_dir=/nowhere/to/write", "model=demo"],
}
SET = r"start one there, or set RAY_ADDRESS to the host:port that `ray start --head` prints"


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateRay]:
    with PrivateRay(num_cpus=1) as cluster:
        yield cluster


def told(command: str, env: dict[str, str], home: Path, seconds: float = 20) -> str:
    """The one line that it says; its exit code is 1."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    began = monotonic()
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]], cwd=ROOT, env=kept | {"HOME": str(home)} | env, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert monotonic() - began < seconds, done.stderr
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("stepladder: ")
    return done.stderr.removeprefix("stepladder: ").rstrip()


@pytest.mark.ray
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_token_and_a_wrong_one_are_told_apart_from_no_cluster(
    cluster: PrivateRay, command: str, tmp_path: Path
) -> None:
    address = {"RAY_ADDRESS": cluster.address}
    wants = re.escape(f"the Ray cluster at {cluster.address} (RAY_ADDRESS={cluster.address}) wants a token, and ")
    then = r"; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN \(or ~/\.ray/auth_token\) to the cluster's"
    for more, why in (
        ({}, "this process has none"),
        ({"RAY_AUTH_MODE": "token"}, "this process has none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, "it refuses the one of this process"),
    ):
        assert re.fullmatch(wants + why + then, told(command, address | more, tmp_path))


@pytest.mark.ray
@pytest.mark.parametrize("command", ["ctl status", "serve"])
def test_nobody_and_somebody_else_at_the_address(cluster: PrivateRay, command: str, tmp_path: Path) -> None:
    """A free port; a server of HTTP; one that takes connections and never says a word."""
    host = cluster.address.rpartition(":")[0]  # Ray puts it in place of any loopback address
    silent, unused = socket.create_server((host, 0)), socket.socket()
    http = HTTPServer((host, 0), BaseHTTPRequestHandler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    with silent, unused, http:
        unused.bind((host, 0))
        for address, answered in (
            (f"{host}:{unused.getsockname()[1]}", "Connection refused"),
            ("no.such.host.invalid:6379", ".*no.such.host.invalid.*"),
            (f"{host}:{http.server_port}", "what answers there is not the head of a cluster"),
            (f"{host}:{silent.getsockname()[1]}", "no answer within 5 s"),
        ):
            said = told(command, {"RAY_ADDRESS": address}, tmp_path)
            assert re.fullmatch(rf"no Ray cluster at \S+ \(RAY_ADDRESS={address}\): {answered}; {SET}", said), said
        http.shutdown()
    assert told(command, {"RAY_ADDRESS": cluster.dashboard}, tmp_path).endswith("own address, such as head:6379")
    assert "Invalid address" in told(command, {"RAY_ADDRESS": "head"}, tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize("command", ["ctl status"])
def test_a_head_that_answers_but_has_no_node_here(cluster: PrivateRay, command: str, tmp_path: Path) -> None:
    """In a process namespace of its own, Ray finds no node of the cluster to attach to."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")
    env = {**os.environ, **cluster.env, "HOME": str(tmp_path)}
    words = [*apart, sys.executable, *COMMANDS[command]]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "answers, but this machine could not attach to it within" in done.stderr and "ray job submit" in done.stderr


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_head_that_hangs_or_has_died(tmp_path: Path) -> None:
    """Also while a driver is attached to it: what it asks of the head is given up, and it can leave."""
    with PrivateRay(num_cpus=1) as cluster:
        (head,) = cluster.processes("gcs_server")
        process = subprocess.Popen(
            [sys.executable, "-c", ATTACHED], cwd=ROOT, env={**os.environ, **cluster.env}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "attached\n"
        head.send_signal(signal.SIGSTOP)
        for command in ("ctl status", "serve"):
            said = told(command, cluster.env, tmp_path)
            assert re.fullmatch(rf"no Ray cluster at {cluster.address} \(.*\): no answer within 5 s; {SET}", said)
        began = monotonic()
        _, said = process.communicate(timeout=60)
        silent = f"the head of the Ray cluster at {cluster.address} does not answer within 3 s; start it again"
        assert (process.returncode, said) == (1, f"stepladder: {silent}\n") and monotonic() - began < 20
        head.kill()
        head.wait()
        for command in COMMANDS:
            said = told(command, cluster.env, tmp_path)
            assert re.fullmatch(rf"no Ray cluster at {cluster.address} \(.*\): Connection refused; {SET}", said)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_deployment_whose_head_dies_says_so_and_can_be_left(tmp_path: Path) -> None:
    with PrivateRay(num_cpus=3) as cluster:
        (head,) = cluster.processes("gcs_server")
        words = ["model=demo", "cluster=local", "layout.tp=1", "engine.threads=1", f"run_dir={tmp_path}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", *words], cwd=ROOT, env={**os.environ, **cluster.env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout
        assert any(line.startswith("STEPLADDER_READY") for line in process.stdout)
        head.kill()
        assert re.fullmatch(
            rf"stepladder: no Ray cluster at {cluster.address} \(.*\): Connection refused; {SET}\n",
            process.stdout.readline(),
        )
        process.send_signal(signal.SIGINT)
        began = monotonic()
        said, _ = process.communicate(timeout=60)
        assert (process.returncode, said) == (1, "stepladder left; what ran there ends without its head\n")
        assert monotonic() - began < 25, "Ray ends it after a minute"


ATTACHED = """
import runpy, sys
from stepladder.launch.ray_cluster import attach
attach()
print("attached", flush=True)
sys.stdin.read()
sys.argv = ["ctl", "status", "seconds=3"]
runpy.run_module("stepladder.launch.ctl", run_name="__main__", alter_sys=True)
"""


def test_a_call_that_takes_too_long_is_left_alone() -> None:
    released = threading.Event()
    with pytest.raises(ConnectionError, match="too long"):
        within(0.05, released.wait, ConnectionError("too long"))
    released.set()
    assert within(5.0, lambda: 7, ConnectionError()) == 7
    with pytest.raises(TimeoutError, match="its own"):
        within(5.0, _late, ConnectionError())


def _late() -> None:
    raise TimeoutError("its own")
