"""The last part of `make demo`: a drafter that goes on learning while its model serves, and traffic that changes."""

import asyncio
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from time import monotonic

from aiohttp import ClientSession, ClientTimeout

from stepladder.launch.acceptance_curve import Curve
from stepladder.launch.deployed import deployed, say, submitting
from stepladder.launch.metrics_file import newest
from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.recipes.library_traffic import beginnings
from stepladder.launch.report import drawn
from stepladder.launch.streaming import session, stream
from stepladder.launch.where import BUNDLED
from stepladder.workers.text.tokenizer import Tokenizer

JOB = "stepladder-demo-learning"
# Always three tokens: by goodput a model as small as this one rests from drafting, and then nobody sees what is learnt.
DRAFTS = ("speculate=head", "speculate.k=3", "train=online")
WORDS = ("model=demo", "cluster=local", *DRAFTS, "monitor.every_seconds=1.0")
BEFORE_SECONDS, AFTER_SECONDS = 35.0, 60.0  # of programs, then of tables
STREAMS, TOKENS = 4, 80
BURST_SECONDS, GAP_SECONDS = 3.0, 6.0  # of requests, and then of none: beside requests training gets very little
MOST = 800  # beginnings of each kind; there are that many of tables


def learning(ray: PrivateRay, run_dir: Path) -> None:
    """Serve, change the traffic, show what came of it; whether acceptance has risen or not."""
    words = [*WORDS, f"run_dir={run_dir}"]
    tokenizer, metrics = Tokenizer(BUNDLED), run_dir / "metrics.jsonl"
    programs, tables = (texts(tokenizer, kind) for kind in ("source", "tables"))
    say("and now a drafter that keeps learning: the bundled model, asked for programs first, then for tables")
    say(submitting(words))
    with deployed(ray, JOB, words) as url:
        say(f"serving at {url}")
        asyncio.run(asked(url, "programs", programs, BEFORE_SECONDS))
        changed = newest(metrics).get("serve/seconds", 0.0)
        asyncio.run(asked(url, "tables", tables, AFTER_SECONDS))
        say(f"ray job stop {JOB}")
    show(Curve.read(metrics, changed), run_dir / "acceptance.png")


async def asked(url: str, kind: str, prompts: Iterator[str], seconds: float) -> None:
    """Some seconds of a few requests at once, a gap, and again. Raises RuntimeError if one fails."""
    say(f"{seconds:.0f} s of requests for {kind}, {STREAMS} at once")
    end = monotonic() + seconds
    async with session(timeout=ClientTimeout(sock_connect=60, sock_read=60)) as opened:
        while monotonic() < end:
            burst = monotonic() + BURST_SECONDS
            while monotonic() < burst:
                await asyncio.gather(*(one(opened, url, seed, next(prompts)) for seed in range(STREAMS)))
            await asyncio.sleep(GAP_SECONDS)


async def one(opened: ClientSession, url: str, seed: int, prompt: str) -> None:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 1.0, "seed": seed}
    timing = await stream(opened, f"{url}/v1/completions", body)
    if timing.error:
        raise RuntimeError(f"an answer failed: {timing.error}")


def texts(tokenizer: Tokenizer, kind: str) -> Iterator[str]:
    """Beginnings, none twice until all were."""
    return cycle([tokenizer.decode(list(tokens)) for tokens in beginnings(tokenizer, kind, MOST, 0)])


def show(curve: Curve, path: Path) -> None:
    """The picture in the terminal, what it says, and a PNG."""
    print("\n  share of the drafter's guesses that came; | traffic changes, ^ another version is live\n")
    print(f"{curve.text()}\n")
    say(curve.told())
    say(f"picture:    {path}" if drawn(curve.draw, path) else "install matplotlib for a picture of it as a PNG")
