"""A Ray cluster of one's own on this machine: free ports, own temporary folder, own token, gone when done.

Used by the demo and by the tests. `ray stop` would end every Ray of the host; this ends only what it started.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Self

import psutil

from stepladder.launch.where import JOB_FOLDER


class RayNode:
    """`ray start --block` in a process group of its own, as a context manager.

    Args:
        options: of `ray start`, besides those that every node here gets.
        env: what it and all its workers have in their environment.
        num_cpus: what Ray believes this machine has.
        seconds: how long it may take to come up.
        address: where other nodes reach this one; None lets Ray choose.
        prefix: words before every command, such as those that run it in a network namespace.

    Raises:
        RuntimeError: it did not come up; the message holds the end of its log.
    """

    def __init__(
        self,
        options: dict[str, object],
        env: dict[str, str],
        num_cpus: int,
        seconds: float,
        address: str | None,
        prefix: Sequence[str],
    ) -> None:
        self.env, self._seconds, self._prefix = env, seconds, tuple(prefix)
        self._folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: Ray puts sockets below it
        self._options = {
            **options,
            **({"--node-ip-address": address} if address else {}),
            "--num-cpus": num_cpus,
            "--object-store-memory": 100_000_000,
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--dashboard-agent-listen-port": 0,
            "--log-style": "record",
            "--log-color": "false",
            "--temp-dir": self._folder,
        }

    def __enter__(self) -> Self:
        options = [name if value is None else f"{name}={value}" for name, value in self._options.items()]
        self._log = (self._folder / "start.log").open("w+")
        self._process = subprocess.Popen(
            [*self._prefix, _ray(), "start", "--block", *options],
            env=self.env,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process that this node started, its detached actors too, and remove its folder."""
        ours = self._processes()
        self._process.terminate()  # `ray start --block` passes it on
        _, alive = psutil.wait_procs(ours, timeout=5)
        for process in {p.pid: p for p in [*alive, *self._processes()]}.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ours, timeout=5)
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def runs(self) -> bool:
        """Whether Ray has not ended by itself, as it does on a node that its cluster has given up."""
        return self._process.poll() is None

    def processes(self, name: str) -> list[psutil.Process]:
        """Live processes of this node whose title (without the folders of the program) begins with `name`.

        For instance "ray::RankActor", or "wandb-core".
        """
        return [p for p in self._processes() if _title(p).startswith(name)]

    def _up(self, log: str) -> bool:
        """Whether this is what it prints once it is up."""
        return "Ray runtime started." in log

    def _wait_until_up(self) -> None:
        deadline, log = monotonic() + self._seconds, Path(self._log.name)
        while monotonic() < deadline and self.runs:
            if self._up(log.read_text()):
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        tail = log.read_text()[-2000:]
        raise RuntimeError(f"a private Ray did not come up within {self._seconds:.0f} s; the end of its log:\n{tail}")

    def _processes(self) -> list[psutil.Process]:
        """Everything below the node's process, and whatever names its folder on its command line."""
        try:
            ours = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            ours = []
        folder = str(self._folder)
        strays = [
            p for p in psutil.process_iter(["cmdline"]) if any(folder in part for part in p.info["cmdline"] or [])
        ]
        return list({p.pid: p for p in [*ours, *strays]}.values())


class PrivateRay(RayNode):
    """The head of a cluster of its own, and where jobs are submitted. Arguments as `RayNode`'s."""

    def __init__(
        self, num_cpus: int = 2, seconds: float = 90.0, address: str | None = None, prefix: Sequence[str] = ()
    ) -> None:
        self._client_port = reserved_port()  # the one port that Ray does not choose by itself
        options: dict[str, object] = {
            "--head": None,
            "--port": 0,
            "--dashboard-host": address or "127.0.0.1",
            "--dashboard-port": 0,
            "--ray-client-server-port": self._client_port.getsockname()[1],
        }
        super().__init__(options, _environment(), num_cpus, seconds, address, prefix)
        self.address = self.dashboard = ""

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._client_port.close()

    def joined(self, num_cpus: int, address: str, prefix: Sequence[str], seconds: float = 90.0) -> RayNode:
        """Another node of this cluster, to be entered while this one runs."""
        env = {key: value for key, value in self.env.items() if key not in _ADDRESSES}
        return RayNode({"--address": self.address}, env, num_cpus, seconds, address, prefix)

    def job_command(self, *words: str) -> list[str]:
        """`ray job ...` with this environment's own `ray`, on the head."""
        return [*self._prefix, _ray(), "job", *words]

    def job(self, *words: str) -> str:
        """Run `ray job ...` against this cluster and return what it printed.

        Raises:
            RuntimeError: it failed; the message holds its output.
        """
        done = subprocess.run(self.job_command(*words), env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ray job {' '.join(words)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def submit(self, job: str, *command: str) -> None:
        """Run `command` as a job of this name, from this checkout if there is one; does not wait for it."""
        self.job("submit", "--no-wait", "--submission-id", job, *JOB_FOLDER, "--", *command)

    def _up(self, log: str) -> bool:
        cluster = re.search(r"ray start --address='([^']+)'", log)
        dashboard = re.search(r"RAY_API_SERVER_ADDRESS='([^']+)'", log)
        if not cluster or not dashboard:
            return False
        self.address, self.dashboard = cluster[1], dashboard[1]
        self.env |= dict(zip(_ADDRESSES, (self.address, self.dashboard), strict=True))
        return True


_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


def _environment() -> dict[str, str]:
    """Token authentication on, in every process alike, and nothing of another cluster."""
    return {
        **{key: value for key, value in os.environ.items() if key not in _ADDRESSES},
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _title(process: psutil.Process) -> str:
    try:
        program, *arguments = process.cmdline() or [""]  # empty when it has ended, a zombie too
    except psutil.NoSuchProcess:
        return ""
    return " ".join([program.rpartition("/")[2], *arguments])


def reserved_port() -> socket.socket:
    """A free port, kept by a socket that does not listen: nobody gets it by chance, and a server that shares ports, as
    those of gRPC do, can take it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("", 0))
    return held
