"""The figures of `vllm bench serve`, under its keys and by its formulas (vllm/benchmarks/serve.py)."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from stepladder.launch.streaming import Timing

SLOS = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency"}  # what a request may have to stay within


def result(
    timings: Sequence[Timing], duration: float, slos: Mapping[str, float], percentiles: Sequence[float]
) -> dict[str, Any]:
    """One run's figures.

    Args:
        duration: of the run, in seconds.
        slos: what a good request stays within, in milliseconds: any of ttft, tpot and e2el.
    """
    good = [timing for timing in timings if timing.success]
    inputs, outputs = sum(t.prompt_tokens for t in good), sum(t.output_tokens for t in good)
    limits = {name: milliseconds / 1000 for name, milliseconds in slos.items()}
    within = sum(all(getattr(t, SLOS[name]) <= limit for name, limit in limits.items()) for t in good)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(timings) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "request_goodput": within / duration if slos else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": peak_chunks(good),
        "max_concurrent_requests": peak_concurrency(good),
    }
    queues = [t.client_queue_time for t in good]
    for name, values in {
        "ttft": [t.ttft for t in good],
        "tpot": [t.tpot for t in good if t.output_tokens > 1],
        "itl": [gap for t in good for gap in t.itl],
        "e2el": [t.latency for t in good],
        "client_queue_time": queues,
        "e2el_including_client_queue": [t.latency + queue for t, queue in zip(good, queues, strict=True)],
    }.items():
        figures |= _statistics(name, values, percentiles)
    return figures | _each(timings)


def peak_chunks(timings: Sequence[Timing]) -> float:
    """Most chunks with text in any second, counted from the first request; vLLM takes a chunk for a token here."""
    if not timings:
        return 0.0
    start = min(t.start_time for t in timings)
    times = [at for t in timings for at in accumulate([t.start_time + t.ttft, *t.itl])]
    return float(np.bincount([int(at - start) for at in times]).max())


def peak_concurrency(timings: Sequence[Timing]) -> int:
    """Most requests under way at any moment."""
    events = sorted(event for t in timings for event in ((t.start_time, 1), (t.start_time + t.latency, -1)))
    return max(accumulate(change for _, change in events), default=0)


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """In milliseconds; of nothing, 0, as vLLM has it."""
    values = np.asarray(seconds or [0.0]) * 1000
    figures = {"mean": np.mean(values), "median": np.median(values), "std": np.std(values)}
    figures |= {f"p{percent:g}": np.percentile(values, percent) for percent in percentiles}
    return {f"{statistic}_{name}_ms": float(value) for statistic, value in figures.items()}


def _each(timings: Sequence[Timing]) -> dict[str, list[Any]]:
    """Per request, in the order of arrival."""
    return {
        "input_lens": [t.prompt_tokens for t in timings],
        "output_lens": [t.output_tokens if t.success else 0 for t in timings],
        "ttfts": [t.ttft for t in timings],
        "itls": [t.itl for t in timings],
        "latencies": [t.latency for t in timings],
        "start_times": [t.start_time for t in timings],
        "queue_times": [t.client_queue_time for t in timings],
        "generated_texts": [t.text for t in timings],
        "errors": [t.error for t in timings],
    }
