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
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Self

import psutil


class PrivateRay:
    """`ray start --head --block` in a process group of its own, as a context manager.

    Args:
        num_cpus: what Ray believes this machine has.
        seconds: how long it may take to come up.

    Raises:
        RuntimeError: it did not come up; the message holds the end of its log.
    """

    def __init__(self, num_cpus: int = 2, seconds: float = 90.0) -> None:
        self._num_cpus, self._seconds = num_cpus, seconds
        self._folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: Ray puts sockets below it
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            self.env.pop(name, None)
        self.address = self.dashboard = ""

    def __enter__(self) -> Self:
        ray = Path(sys.executable).with_name("ray")
        options = {
            "--port": 0,
            "--dashboard-host": "127.0.0.1",
            "--num-cpus": self._num_cpus,
            "--object-store-memory": 100_000_000,
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--dashboard-port": 0,
            "--dashboard-agent-listen-port": 0,
            "--ray-client-server-port": _free_port(),  # the one port that Ray does not choose by itself
            "--log-style": "record",
            "--log-color": "false",
            "--temp-dir": self._folder,
        }
        command = [str(ray), "start", "--head", "--block", *(f"{key}={value}" for key, value in options.items())]
        self._log = (self._folder / "start.log").open("w+")
        self._process = subprocess.Popen(
            command,
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
        """End every process that this cluster started, its detached actors too, and remove its folder."""
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

    def job_command(self, *words: str) -> list[str]:
        """`ray job ...` with this environment's own `ray`."""
        return [str(Path(sys.executable).with_name("ray")), "job", *words]

    def job(self, *words: str) -> str:
        """Run `ray job ...` against this cluster and return what it printed.

        Raises:
            RuntimeError: it failed; the message holds its output.
        """
        done = subprocess.run(self.job_command(*words), env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ray job {' '.join(words)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def _wait_until_up(self) -> None:
        deadline = monotonic() + self._seconds
        while monotonic() < deadline and self._process.poll() is None:
            log = Path(self._log.name).read_text()
            cluster = re.search(r"ray start --address='([^']+)'", log)
            dashboard = re.search(r"RAY_API_SERVER_ADDRESS='([^']+)'", log)
            if cluster and dashboard:
                self.address, self.dashboard = cluster[1], dashboard[1]
                self.env |= {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard}
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        tail = Path(self._log.name).read_text()[-2000:]
        raise RuntimeError(f"a private Ray did not come up within {self._seconds:.0f} s; the end of its log:\n{tail}")

    def processes(self, name: str) -> list[psutil.Process]:
        """Live processes of this cluster whose title begins with `name`, such as "ray::RankActor"."""
        return [p for p in self._processes() if _title(p).startswith(name)]

    def _processes(self) -> list[psutil.Process]:
        """Everything below the head process, and whatever of its session names our folder."""
        try:
            ours = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            ours = []
        folder = str(self._folder)
        strays = [
            p for p in psutil.process_iter(["cmdline"]) if any(folder in part for part in p.info["cmdline"] or [])
        ]
        return list({p.pid: p for p in [*ours, *strays]}.values())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
