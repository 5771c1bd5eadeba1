"""OpenTelemetry traces, as an option: one span per HTTP request, sent to a collector in batches over OTLP/HTTP.

Names are vLLM's, so that its dashboards fit: https://docs.vllm.ai/en/latest/examples/observability/opentelemetry/
A trace that the client began (W3C `traceparent`) goes on here, with its decision whether to sample. Prompts and answers
are not in it. OpenTelemetry's packages are an extra, imported only where traces are wanted.
"""

import threading
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from stepladder.cluster.config import check_endpoint

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from stepladder.cluster.gateway.choices import Choices

GENERATING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
LLM_SPAN = "llm_request"  # vLLM's name for a request that generates; others have that of HTTP: method and route
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")


class Traces:
    """Makes spans and sends them from a thread of its own; what a slow or dead collector does not take is dropped.

    OpenTelemetry's environment variables hold, such as OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_TRACES_HEADERS and
    OTEL_TRACES_SAMPLER.

    Args:
        endpoint: see `check_endpoint`, whose errors this raises.
        version: of Stepladder.
        every_seconds: how often a batch is sent; None leaves it to OpenTelemetry (5, or OTEL_BSP_SCHEDULE_DELAY).
    """

    def __init__(self, endpoint: str, version: str, every_seconds: float | None = None) -> None:
        endpoint = check_endpoint(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = Resource({"service.name": "stepladder", "service.version": version})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        delay = None if every_seconds is None else 1000 * every_seconds
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint), schedule_delay_millis=delay))
        self._tracer = self._provider.get_tracer("stepladder", version)
        self._propagator, self._kind = TraceContextTextMapPropagator(), SpanKind.SERVER

    def begin(self, scope: Scope) -> "Span":
        """The span of an HTTP request, within the client's trace if it sends one."""
        sent = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT_HEADERS}
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"], "url.scheme": scope["scheme"]}
        context = self._propagator.extract(sent)
        return self._tracer.start_span(LLM_SPAN, context, kind=self._kind, attributes=attributes)

    def close(self, seconds: float = 3.0) -> None:
        """Send what is left, for at most so long; blocks. Spans that end later are dropped."""
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(seconds)


class Traced:
    """ASGI middleware: a span per HTTP request. What is inside leaves in `scope["state"]` the status, the answer that
    the request became, if it did, and the error that ended a stream.

    Args:
        untraced: paths that get none, such as those of probes.
    """

    def __init__(self, app: ASGIApp, traces: Traces, untraced: frozenset[str]) -> None:
        self._app, self._traces, self._untraced = app, traces, untraced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._untraced:
            await self._app(scope, receive, send)
            return
        span, state = self._traces.begin(scope), scope.setdefault("state", {})
        try:
            await self._app(scope, receive, send)
        finally:
            if span.is_recording():
                _describe_http(span, scope, state.get("status", 0), state.get("error"))
                if "answer" in state:
                    span.set_attributes(answer_attributes(state["answer"]))
            span.end()


def _describe_http(span: "Span", scope: Scope, status: int, error: Exception | None) -> None:
    """OpenTelemetry's conventions for servers: only an error of the server's own makes the span one."""
    route = getattr(scope.get("route"), "path", None)
    if route not in GENERATING_PATHS:
        span.update_name(f"{scope['method']} {route}" if route else scope["method"])
    if route:
        span.set_attribute("http.route", route)
    if status:
        span.set_attribute("http.response.status_code", status)
    if status >= 500 or error:
        from opentelemetry.trace import StatusCode

        span.set_attribute("error.type", type(error).__name__ if error else str(status))
        span.set_status(StatusCode.ERROR, getattr(error, "message", None))  # an ApiError's; others may quote texts


def answer_attributes(answer: "Choices") -> dict[str, Any]:
    """vLLM's attributes, times in seconds. Of several sequences: the first token of any, the end of the last, and the
    longest of each phase. What has not come to be is left out."""
    choices, params = answer.choices, answer.choices[0].request.params
    meters = [choice.meter for choice in choices if choice.meter]
    found: dict[str, Any] = {
        "gen_ai.request.id": answer.format.prefix + answer.id,
        "gen_ai.request.model": answer.asked.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": answer.asked.n,
        "gen_ai.usage.prompt_tokens": answer.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": sum(choice.num_tokens for choice in choices),
        "gen_ai.response.finish_reasons": [meter.ended for meter in meters if meter.ended],
    }
    if begun := [meter for meter in meters if meter.begun]:
        found["gen_ai.latency.time_to_first_token"] = min(meter.time_to_first_token for meter in begun)
        found["gen_ai.latency.e2e"] = max(meter.e2e for meter in begun)
    phases = [meter.phases for meter in begun]
    for phase, attribute in _PHASE_ATTRIBUTES.items():
        if known := [seconds[phase] for seconds in phases if phase in seconds]:
            found[attribute] = max(known)
    return found


_PHASE_ATTRIBUTES = {
    "queue": "gen_ai.latency.time_in_queue",
    "prefill": "gen_ai.latency.time_in_model_prefill",
    "decode": "gen_ai.latency.time_in_model_decode",
    "inference": "gen_ai.latency.time_in_model_inference",
}
