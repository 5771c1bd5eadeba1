"""What serving costs besides the engine: CPU time of every process of a deployment while it answers streams."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil

from stepladder.launch.deployed import deployed
from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.streaming import session, stream

ENGINE = "ray::RankActor"
IDLE_SECONDS = 15.0


@dataclass(frozen=True)
class Costs:
    """CPU-seconds per generated token. engine: the rank's process; idle: what the same Ray cluster took in the same
    time before anything was deployed on it; serving: all that is left, of Ray, ZeroMQ, controller and gateway."""

    engine: float
    serving: float
    idle: float


def cpu_seconds_of_serving(model: Path, streams: int, tokens: int) -> Costs:
    """One rank, float32, `streams` concurrent streaming requests of `tokens` tokens each, three rounds."""
    with PrivateRay() as ray, TemporaryDirectory() as run_dir:
        idle_per_second = _idle(ray)
        options = ["model=path", f"model.path={model}", "model.name=random", "layout.tp=1", f"run_dir={run_dir}"]
        with deployed(ray, "overhead", [*options, "monitor=jsonl", "name=overhead"]) as url:
            asyncio.run(_stream(url, streams, tokens))
            before, began = _cpu(ray), time.monotonic()
            total = sum(asyncio.run(_stream(url, streams, tokens)) for _ in range(3))
            used, seconds = _since(before, _cpu(ray)), time.monotonic() - began
            engines = {p.pid for p in ray.processes(ENGINE)}
    engine, idle = sum(used[pid] for pid in engines), idle_per_second * seconds
    return Costs(engine / total, (sum(used.values()) - engine - idle) / total, idle / total)


def _idle(ray: PrivateRay) -> float:
    """CPU-seconds per second of a Ray cluster that has nothing to do."""
    before, began = _cpu(ray), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return sum(_since(before, _cpu(ray)).values()) / (time.monotonic() - began)


def _since(before: dict[int, float], after: dict[int, float]) -> dict[int, float]:
    return {pid: seconds - before.get(pid, 0.0) for pid, seconds in after.items()}


def _cpu(ray: PrivateRay) -> dict[int, float]:
    """User and system seconds so far, by process."""
    times = {}
    for process in ray.processes(""):
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            times[process.pid] = used.user + used.system
    return times


async def _stream(url: str, streams: int, tokens: int) -> int:
    """Read `streams` streams at once; returns the number of tokens generated."""
    body = {"model": "random", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    bodies = [{**body, "prompt": f"def number_{index}("} for index in range(streams)]
    async with session(timeout=aiohttp.ClientTimeout()) as opened:
        timings = await asyncio.gather(*(stream(opened, f"{url}/v1/completions", one) for one in bodies))
    if failed := [timing.error for timing in timings if timing.error]:
        raise RuntimeError(f"a stream failed: {failed[0]}")
    return streams * tokens
