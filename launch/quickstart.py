"""`make demo`: a private Ray, the bundled Ladder model on two tensor-parallel ranks, three streamed completions.

Everything goes the way a user's own deployment would: `ray job submit`, HTTP, `ray job stop`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic, strftime
from typing import Any

import requests

from launch.private_ray import PrivateRay

ROOT = Path(__file__).parent.parent
TOKENS = 96
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a file."""\n    ',
    'class Stack:\n    """A last-in, first-out queue."""\n\n    def __init__(self):\n        ',
    "import argparse\nimport sys\n\ndef main():\n    parser = argparse.ArgumentParser()\n    ",
)


@dataclass
class Timing:
    """Of one streamed completion, in seconds from sending the request; `arrivals` are those of its chunks."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def tpot(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)


def main() -> None:
    run_dir = Path.home() / "stepladder-runs" / f"demo-{strftime('%Y%m%d-%H%M%S')}"
    say("starting a private Ray (free ports, own folder, token authentication)")
    with PrivateRay() as ray, submitted(ray, run_dir) as url:
        say(f"serving at {url}")
        timings = [stream(url, prompt) for prompt in PROMPTS]
        show(timings, hidden_share(run_dir / "metrics.jsonl"))
    offline = next(iter(sorted(run_dir.glob("wandb/*run-*"))), None)
    say(f"W&B run:   {offline or 'none'}")
    say(f"JSONL log: {run_dir / 'metrics.jsonl'}")
    say("everything is shut down")


@contextmanager
def submitted(ray: PrivateRay, run_dir: Path) -> Iterator[str]:
    """The demo deployment as a Ray job; yields its URL once it is ready, stops the job in the end."""
    command = ["python", "-m", "launch.serve", "model=demo", "cluster=local", "layout.tp=2", f"run_dir={run_dir}"]
    command += ["monitor.every_seconds=1.0"]
    say("ray job submit --working-dir . -- " + " ".join(command))
    job = "stepladder-demo"
    ray.job("submit", "--no-wait", "--submission-id", job, "--working-dir", str(ROOT), "--", *command)
    try:
        yield ready(ray, job)
    finally:
        say(f"ray job stop {job}")
        ray.job("stop", job)


def ready(ray: PrivateRay, job: str) -> str:
    """Follow the job's log until it says where it serves.

    Raises:
        SystemExit: the job ended before; the message is its log.
    """
    log = subprocess.Popen(ray.job_command("logs", "--follow", job), env=ray.env, stdout=subprocess.PIPE, text=True)
    assert log.stdout
    try:
        for line in log.stdout:
            if line.startswith("STEPLADDER_READY "):
                return line.split()[1]
            if line.startswith("stepladder"):
                say(line.strip())
    finally:
        log.kill()
        log.wait()
        log.stdout.close()
    sys.exit(f"the job ended before it was ready:\n{ray.job('logs', job)}")


def stream(url: str, prompt: str) -> Timing:
    """One completion, printed as it comes."""
    print(f"\n\033[2m{prompt}\033[0m", end="", flush=True)
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "repetition_penalty": 1.15,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing = Timing(monotonic())
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines(chunk_size=1):
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                timing.arrivals.append(monotonic())
                print(chunk["choices"][0]["text"], end="", flush=True)
            else:
                timing.tokens = chunk["usage"]["completion_tokens"]
    print()
    return timing


def hidden_share(figures: Path) -> float | None:
    """Newest share of all-reduce time that was hidden behind compute."""
    rows = [json.loads(line) for line in figures.read_text().splitlines()]
    shares = [row["engine/reduce_hidden_share"] for row in rows if "engine/reduce_hidden_share" in row]
    return shares[-1] if shares else None


def show(timings: list[Timing], hidden: float | None) -> None:
    """The table at the end."""
    tpot = median(t.tpot for t in timings)
    rows = (
        ("TTFT, median", f"{median(t.ttft for t in timings) * 1e3:.1f} ms"),
        ("TPOT, median", f"{tpot * 1e3:.1f} ms"),
        ("tokens/s, one stream", f"{1 / tpot:.0f}"),
        ("all-reduce time hidden", "not measured" if hidden is None else f"{hidden:.0%} (gloo, two ranks on this CPU)"),
    )
    print()
    for name, value in rows:
        print(f"  {name:<24}{value}")
    print()


def say(text: str) -> None:
    print(f"\033[36m▸\033[0m {text}", flush=True)


if __name__ == "__main__":
    main()
