"""Suite `serve`: load on an OpenAI endpoint, in the figures of `vllm bench serve`.

Against a server that runs (base_url), or against a deployment of its own in a private Ray.
"""

import asyncio
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp
from tqdm import tqdm

from stepladder.launch.bench.serve.load import Case, apply
from stepladder.launch.bench.serve.measures import SLOS, result
from stepladder.launch.bench.serve.prompts import Prompt, PromptConfig, prompts
from stepladder.launch.deployed import deployed
from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.report import Goal, Report, Row, at_least, at_most
from stepladder.launch.streaming import Timing, session, stream


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """Options.

    Attributes:
        base_url: such as http://127.0.0.1:8000; None starts a deployment with the options `deploy` of launch.serve in
            a private Ray that believes in `ray_cpus` processors.
        model_name: as clients call it; None takes the server's first.
        cases: loads, each run by itself, one after the other.
        num_warmups: requests before the first case, none of them measured.
        goodput: what a good request stays within, in milliseconds: any of ttft, tpot, e2el.
        goodput_share: the share of good requests that is wanted.
        percentiles: of every latency.
        temperature, ignore_eos: of every request. seed: of prompts and arrivals.
        timeout_seconds: of one request.
    """

    name: str
    run_dir: str
    base_url: str | None = None
    model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    deploy: str = "model=demo"
    ray_cpus: int = 4
    cases: dict[str, Case] = field(default_factory=dict)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    num_warmups: int = 2
    goodput: dict[str, float] = field(default_factory=dict)
    goodput_share: float = 0.99
    percentiles: list[float] = field(default_factory=lambda: [50.0, 90.0, 99.0])
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if unknown := set(self.goodput) - set(SLOS):
            raise ValueError(f"goodput.{unknown.pop()} is not an option; goodput takes {', '.join(SLOS)}")
        if not self.cases:
            raise ValueError("cases is empty; name at least one load")
        if any(not 0 <= percent <= 100 for percent in self.percentiles):
            raise ValueError(f"percentiles is {self.percentiles}; each must be between 0 and 100")


def run(config: ServeBench) -> Report:
    """Run every case; the report's details hold each one's figures under vLLM's keys.

    Raises:
        ValueError: the server does not answer as an OpenAI endpoint does. RuntimeError: it did not come up.
    """
    with endpoint(config) as url:
        results = asyncio.run(_run_cases(config, url))
    rows = [row for name, figures in results.items() for row in _rows(name, config.cases[name], figures)]
    contents = "figures under vLLM's keys"
    return Report("serve", rows, _summary(config, results), details=results, contents=contents)


@contextmanager
def endpoint(config: ServeBench) -> Iterator[str]:
    """The server's URL; a deployment of one's own is gone in the end."""
    if config.base_url is not None:
        yield config.base_url.rstrip("/").removesuffix("/v1")
        return
    options = ["name=bench", f"run_dir={config.run_dir}/serve", *shlex.split(config.deploy)]
    with PrivateRay(num_cpus=config.ray_cpus) as ray, deployed(ray, "bench", options) as url:
        yield url


async def _run_cases(config: ServeBench, url: str) -> dict[str, dict[str, Any]]:
    limits = aiohttp.ClientTimeout(total=config.timeout_seconds)
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    async with session(timeout=limits, headers=headers) as opened:
        client = Client(config, url, opened)
        await client.prepare()
        return {name: await client.run(name, case) for name, case in config.cases.items()}


class Client:
    """One benchmark's session with one server."""

    def __init__(self, config: ServeBench, url: str, session: aiohttp.ClientSession) -> None:
        self._config, self._url, self._session = config, url, session
        self._model = config.model_name or ""

    async def prepare(self) -> None:
        """Find the model's name and warm the server up; ValueError with its own words if it cannot serve us."""
        if not self._model:
            listed = await self._json("GET", "/v1/models")
            self._model = listed["data"][0]["id"]
        for prompt in await self._prompts(self._config.num_warmups, self._config.seed + 1):
            timing = await self._send(prompt)
            if not timing.success:
                raise ValueError(f"{self._url} did not answer a warm-up request: {timing.error}")

    async def run(self, name: str, case: Case) -> dict[str, Any]:
        """One case's figures."""
        config = self._config
        requests = await self._prompts(case.num_requests, config.seed)
        with tqdm(total=len(requests), desc=name, unit="request") as bar:

            async def send(prompt: Prompt) -> Timing:
                timing = await self._send(prompt)
                bar.update()
                return timing

            timings, duration = await apply(case, config.seed, requests, send)
        about = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "backend": "openai",
            "model_id": self._model,
            "num_prompts": case.num_requests,
            "request_rate": "inf" if case.request_rate is None else case.request_rate,
            "burstiness": case.burstiness,
            "max_concurrency": case.max_concurrency,
        }
        return about | result(timings, duration, config.goodput, config.percentiles)

    async def _send(self, prompt: Prompt) -> Timing:
        config = self._config
        body = {"model": self._model, **prompt.fields, "max_tokens": prompt.output_tokens}
        body |= {"temperature": config.temperature, "ignore_eos": config.ignore_eos, "seed": config.seed}
        return await stream(self._session, self._url + prompt.path, body)

    async def _prompts(self, count: int, seed: int) -> list[Prompt]:
        return await prompts(self._config.prompts, count, seed, self._tokenize) if count else []

    async def _tokenize(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return (await self._json("POST", "/tokenize", json=body))["tokens"]

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            async with self._session.request(method, self._url + path, **options) as response:
                response.raise_for_status()
                return await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            hint = "; give prompts.dataset=..." if path == "/tokenize" else ""
            raise ValueError(f"{self._url}{path} does not answer as it should: {error}{hint}") from None


def _rows(name: str, case: Case, figures: dict[str, Any]) -> list[Row]:
    """An open loop cannot serve more than arrives; a closed one not more than its clients' latency allows (Little)."""
    bound = case.request_rate
    if bound is None and case.max_concurrency and figures["mean_e2el_ms"]:
        bound = 1000 * case.max_concurrency / figures["mean_e2el_ms"]
    throughput, goodput = figures["request_throughput"], figures["request_goodput"]
    rows = [Row(name, "request_throughput", throughput, "requests/s", bound)]
    if goodput is not None:
        rows.append(Row(name, "request_goodput", goodput, "requests/s", throughput))
    rows.append(Row(name, "output_throughput", figures["output_throughput"], "tokens/s"))
    latencies = [f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in ("median", "p99")]
    if case.request_rate is not None:  # a closed loop waits for its answers by design
        latencies.append("p99_client_queue_time_ms")
    latencies = [key for key in latencies if key in figures]
    return rows + [Row(name, key.removesuffix("_ms"), figures[key], "ms") for key in latencies]


def _summary(config: ServeBench, results: dict[str, dict[str, Any]]) -> dict[str, Goal]:
    summary: dict[str, Goal] = {}
    for name, figures in results.items():
        summary[f"{name}: failed requests"] = at_most(figures["failed"], 0)
        if config.goodput:
            share = round(figures["request_goodput"] * figures["duration"]) / len(figures["errors"])
            summary[f"{name}: share of good requests"] = at_least(share, config.goodput_share)
    return summary


SUITE = ServeBench, run
