"""Prometheus metrics under vLLM's names with the prefix `stepladder:`, measured where the client is served.

Intervals are differences of this process's `time.monotonic()`, so TTFT includes tokenization and queueing; those of an
engine (queue, prefill) come from there as durations. Names and buckets:
https://docs.vllm.ai/en/latest/design/metrics.html.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, product
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from stepladder.cluster.gateway.latency_window import LatencyWindow
from stepladder.workers.core import Start
from stepladder.workers.engine import STEP_TOKENS, EngineStats
from stepladder.workers.figures import COUNTER, GAUGE, declared

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_PHASE = _WHOLE[1:]  # exactly vLLM's
_TOKENS = tuple(mantissa * 10**power for power, mantissa in product(range(6), (1, 2, 5)))

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _FIRST),
    "inter_token_latency_seconds": ("Between two outputs of a sequence; an output may hold several tokens.", _BETWEEN),
    "request_time_per_output_token_seconds": ("TPOT: (last - first token) / (tokens - 1).", _BETWEEN),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _WHOLE),
    "request_queue_time_seconds": ("From arrival in the engine to the first place in a step.", _PHASE),
    "request_prefill_time_seconds": ("From the first place in a step to the first token.", _PHASE),
    "request_decode_time_seconds": ("From the first token to the last.", _PHASE),
    "request_inference_time_seconds": ("Prefill and decode.", _PHASE),
    "request_prompt_tokens": ("Prompt tokens of a sequence.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a sequence.", _TOKENS),
    "request_max_num_generation_tokens": ("Generated tokens of the longest of a prompt's n sequences.", _TOKENS),
    "request_params_max_tokens": ("The parameter max_tokens of a sequence.", _TOKENS),
    "request_params_n": ("The parameter n of a prompt.", (1, 2, 5, 10, 20)),
}


class OfEngines(Collector):
    """What every engine counts itself, in a form that no declared figure has.

    Attributes:
        engines: `EngineStats` by name, of the engines there are now. One that was restarted begins anew.
    """

    def __init__(self, model_name: str) -> None:
        self.engines: Mapping[str, Mapping[str, Any]] = {}
        self._model_name = model_name


class StepSizes(OfEngines):
    """The histogram of tokens per step."""

    def collect(self) -> Iterable[Metric]:
        name, labels = "stepladder:iteration_tokens_total", ["model_name", "engine"]
        family = HistogramMetricFamily(name, "Tokens of a step.", labels=labels)
        bounds = [*(str(float(bound)) for bound in STEP_TOKENS), "+Inf"]
        for engine, stats in self.engines.items():
            buckets = list(zip(bounds, accumulate(stats["step_sizes"]), strict=True))
            family.add_metric([self._model_name, engine], buckets, stats["step_tokens"])
        yield family


class Listed(OfEngines):
    """A counter for each place in a list: a field of `EngineStats` under a name of its own, `label` for the place."""

    def __init__(self, model_name: str, field: str, name: str, text: str, label: str) -> None:
        super().__init__(model_name)
        self._field, self._name, self._text, self._label = field, f"stepladder:{name}", text, label

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=["model_name", "engine", self._label])
        for engine, stats in self.engines.items():
            for place, count in enumerate(stats[self._field]):
                family.add_metric([self._model_name, engine, str(place)], count)
        yield family


LISTED = (
    (
        "accepted_at",
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens accepted, by place in the draft.",
        "position",
    ),
    ("expert_tokens", "expert_tokens", "Tokens of all layers, by expert.", "expert"),
)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry, self.window = CollectorRegistry(), LatencyWindow()
        self._model_name = model_name
        self._histograms: dict[str, Histogram] = {
            name: self._of_server(Histogram, name, text, buckets=buckets)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self.prompt_tokens = self._of_server(Counter, "prompt_tokens", "Prompt tokens of sequences that got a token.")
        self.generation_tokens = self._of_server(Counter, "generation_tokens", "Generated tokens.")
        self._success = Counter(
            "stepladder:request_success",
            "Sequences that ended, by why; abort: the client left, error: refused or failed.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.in_flight = self._of_server(Gauge, "num_requests_in_flight", "HTTP requests being answered here.")
        self._gauges: dict[str, Gauge] = self._of_engines(Gauge, GAUGE)
        self._counters: dict[str, Counter] = self._of_engines(Counter, COUNTER)
        self._collectors = [StepSizes(model_name), *(Listed(model_name, *one) for one in LISTED)]
        for collector in self._collectors:
            self.registry.register(collector)
        self._seen: dict[tuple[str, str], float] = {}

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def ended(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def answered(self, max_tokens: int, num_tokens: Sequence[int]) -> None:
        """All sequences of a prompt have ended by themselves: so many tokens each, of at most `max_tokens`."""
        self.observe("request_params_n", len(num_tokens))
        self.observe("request_max_num_generation_tokens", max(num_tokens))
        for _ in num_tokens:
            self.observe("request_params_max_tokens", max_tokens)

    def update_engines(self, engines: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the fields of each engine's `EngineStats`, by name: of all there are now.

        The gauges of an engine that is gone are forgotten; its counters stay, as counters must. A counter that went
        back means a restarted engine.
        """
        for collector in self._collectors:
            collector.engines = engines
        for gauge in self._gauges.values():
            gauge.clear()
        for engine, stats in engines.items():
            for field, gauge in self._gauges.items():
                gauge.labels(self._model_name, engine).set(stats[field])
            for field, counter in self._counters.items():
                before, now = self._seen.get((engine, field), 0.0), stats[field]
                counter.labels(self._model_name, engine).inc(now - before if now >= before else now)
                self._seen[engine, field] = now

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _of_engines(self, make: Callable[..., Any], kind: str) -> dict[str, Any]:
        """A metric for every figure of an engine that is declared as one of this kind."""
        return {
            one.name: make(f"stepladder:{how.metric}", how.text, ["model_name", "engine"], registry=self.registry)
            for one, how in declared(EngineStats)
            if how.kind == kind and how.metric
        }

    def _of_server(self, make: Callable[..., Any], name: str, text: str, **options: Any) -> Any:
        metric = make(f"stepladder:{name}", text, ["model_name"], registry=self.registry, **options)
        return metric.labels(self._model_name)


class SequenceMeter:
    """The clock of one sequence, read at every output.

    Attributes:
        ended: why; None while it runs.
    """

    def __init__(self, metrics: Metrics, arrived: float, num_prompt_tokens: int) -> None:
        self._metrics, self._arrived, self._num_prompt_tokens = metrics, arrived, num_prompt_tokens
        self._first = self._last = arrived
        self._num_tokens = 0
        self._start: Start | None = None
        self.ended: str | None = None

    @property
    def begun(self) -> bool:
        """Whether there has been an output."""
        return self._last > self._arrived

    @property
    def time_to_first_token(self) -> float:
        return self._first - self._arrived

    @property
    def e2e(self) -> float:
        return self._last - self._arrived

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of queue, prefill, decode and inference. Those of the attempt that gave the first token, if it was
        replayed; a retry that continues one of another gateway has only decode."""
        decode = self._last - self._first
        if self._start is None:
            return {"decode": decode}
        queue, prefill = self._start.queue_seconds, self._start.prefill_seconds
        return {"queue": queue, "prefill": prefill, "decode": decode, "inference": prefill + decode}

    def output(self, num_tokens: int) -> None:
        """The engine has sent this many tokens, now."""
        now, metrics = monotonic(), self._metrics
        if self._num_tokens:
            metrics.observe("inter_token_latency_seconds", now - self._last)
        else:
            metrics.observe("time_to_first_token_seconds", now - self._arrived)
            metrics.window.ttft.append(now - self._arrived)
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
            self._first = now
        self._last = now
        self._num_tokens += num_tokens
        metrics.generation_tokens.inc(num_tokens)
        metrics.window.tokens += num_tokens

    def end(self, reason: str, start: Start | None) -> None:
        """It has ended, for this reason. Latencies of unfinished sequences would mislead and are not counted.

        Args:
            start: what the engine said with the first token.
        """
        metrics, self.ended, self._start = self._metrics, reason, start
        metrics.ended(reason)
        if reason not in ("stop", "length"):
            return
        per_token = (self._last - self._first) / (self._num_tokens - 1) if self._num_tokens > 1 else None
        metrics.window.finished += 1
        if per_token is not None:
            metrics.window.tpot.append(per_token)
            metrics.observe("request_time_per_output_token_seconds", per_token)
        metrics.observe("e2e_request_latency_seconds", self.e2e)
        if start is not None:
            for phase, seconds in self.phases.items():
                metrics.observe(f"request_{phase}_time_seconds", seconds)
        metrics.observe("request_prompt_tokens", self._num_prompt_tokens)
        metrics.observe("request_generation_tokens", self._num_tokens)
