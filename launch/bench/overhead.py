"""What serving costs besides the engine: CPU time of every process of a deployment while it answers streams."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import requests

from launch.private_ray import PrivateRay
from launch.quickstart import ROOT, ready

ENGINE = "ray::RankActor"


def cpu_seconds_of_serving(model: Path, streams: int, tokens: int) -> tuple[float, float]:
    """CPU-seconds per generated token: the engine's process, and all other processes of Ray and of the deployment.

    One rank, float32, `streams` concurrent streaming requests of `tokens` tokens each, three rounds.
    """
    with PrivateRay() as ray, TemporaryDirectory() as run_dir:
        command = [
            "python",
            "-m",
            "launch.serve",
            "model=path",
            f"model.path={model}",
            "model.name=random",
            "layout.tp=1",
        ]
        command += [f"run_dir={run_dir}", "monitor=jsonl", "name=overhead"]
        ray.job("submit", "--no-wait", "--submission-id", "overhead", "--working-dir", str(ROOT), "--", *command)
        url = ready(ray, "overhead")
        _stream(url, streams, tokens)
        before = _cpu(ray)
        total = sum(_stream(url, streams, tokens) for _ in range(3))
        after = _cpu(ray)
        used = {pid: seconds - before.get(pid, 0.0) for pid, seconds in after.items()}
        engines = {p.pid for p in ray.processes(ENGINE)}
        engine = sum(seconds for pid, seconds in used.items() if pid in engines)
        ray.job("stop", "overhead")
    return engine / total, (sum(used.values()) - engine) / total


def _cpu(ray: PrivateRay) -> dict[int, float]:
    """User and system seconds so far, by process."""
    times = {}
    for process in ray.processes(""):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        times[process.pid] = used.user + used.system
    return times


def _stream(url: str, streams: int, tokens: int) -> int:
    """Read `streams` streams at once; returns the number of tokens generated."""

    def one(index: int) -> None:
        body: dict[str, Any] = {"model": "random", "prompt": f"def number_{index}(", "max_tokens": tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        with requests.post(f"{url}/v1/completions", json=body, stream=True) as answer:
            answer.raise_for_status()
            for _ in answer.iter_lines(chunk_size=1024):
                pass

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(one, range(streams)))
    return streams * tokens
