"""OpenTelemetry traces as a collector gets them."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from stepladder.cluster.config import GatewayConfig
from stepladder.cluster.gateway.api import build_app
from stepladder.cluster.gateway.middleware import Gatekeeper
from stepladder.cluster.gateway.tracing import Traces, check_endpoint
from tests.cluster.collector import Collector, Found, collecting
from tests.cluster.serving import Server, eventually, serve

pytestmark = pytest.mark.timeout(60)
ASK: dict[str, Any] = {"model": "org/tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0.5, "ignore_eos": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(random_model: Path, collector: Collector) -> Iterator[Server]:
    traces = Traces(collector.url, "1.2.3", every_seconds=0.05)
    with serve(random_model, traces=traces, api_key="secret") as server:
        yield server
    traces.close()


def ask(server: Server, path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
    return server.post(path, ASK, headers={**KEY, **headers}).json()


def span_of(collector: Collector, request_id: str) -> Found:
    """The one span of this request."""
    eventually(lambda: collector.of(request_id))
    (found,) = collector.of(request_id)
    return found


def by_path(collector: Collector, path: str) -> Found:
    """The newest one of this path."""
    eventually(lambda: any(found.attributes["url.path"] == path for found in collector.spans))
    return next(found for found in reversed(collector.spans) if found.attributes["url.path"] == path)


def test_a_request_is_a_span_with_vllms_attributes(server: Server, collector: Collector) -> None:
    before = time.time_ns()
    answer = ask(server, **{"X-Request-Id": "mine"})
    found = span_of(collector, answer["id"])
    latency = {k.removeprefix("gen_ai.latency."): v for k, v in found.attributes.items() if k.startswith("gen_ai.l")}
    rest = {k: v for k, v in found.attributes.items() if not k.startswith("gen_ai.latency.")}
    assert rest == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "gen_ai.request.id": "cmpl-mine",
        "gen_ai.request.model": "org/tiny",
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.n": 1,
        "gen_ai.usage.prompt_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.completion_tokens": 12,
        "gen_ai.response.finish_reasons": ["length"],
    }
    model = {f"time_in_model_{phase}" for phase in ("prefill", "decode", "inference")}
    assert latency.keys() == {"time_in_queue", "time_to_first_token", "e2e", *model} and min(latency.values()) > 0
    assert latency["time_in_queue"] + latency["time_in_model_prefill"] < latency["time_to_first_token"]
    assert latency["time_in_model_decode"] == pytest.approx(latency["e2e"] - latency["time_to_first_token"])
    span = found.span
    assert (span.name, span.kind, span.parent_span_id) == ("llm_request", Span.SPAN_KIND_SERVER, b"")
    assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
    assert latency["e2e"] < (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert (found.resource["service.name"], found.resource["service.version"]) == ("stepladder", "1.2.3")


def test_several_choices_are_one_span(server: Server, collector: Collector) -> None:
    body = {**ASK, "prompt": ["ab", "cde"], "n": 2, "stream": True}
    asked, lines, times = time.monotonic(), [], []
    with httpx.stream("POST", server.url + "/v1/completions", json=body, headers=KEY) as stream:
        for line in filter(None, stream.iter_lines()):
            lines.append(line)
            times.append(time.monotonic())
        name = stream.headers["x-request-id"]
    assert lines[-1] == "data: [DONE]"
    found = span_of(collector, f"cmpl-{name}")
    assert found.attributes["gen_ai.request.n"] == 2 and found.attributes["gen_ai.usage.prompt_tokens"] == 5
    assert found.attributes["gen_ai.usage.completion_tokens"] == 48
    assert found.attributes["gen_ai.response.finish_reasons"] == ["length"] * 4
    assert 0 < found.attributes["gen_ai.latency.time_to_first_token"] < times[0] - asked
    assert found.attributes["gen_ai.latency.e2e"] < times[-1] - asked


def test_the_clients_trace_goes_on(server: Server, collector: Collector) -> None:
    answer = ask(server, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="vendor=x")
    span = span_of(collector, answer["id"]).span
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=x")
    assert span.span_id.hex() != PARENT


def test_a_trace_that_is_not_sampled_is_not_sent(server: Server, collector: Collector) -> None:
    unsampled = ask(server, traceparent=f"00-{TRACE}-{PARENT}-00")
    span_of(collector, ask(server)["id"])
    assert not collector.of(unsampled["id"])


def test_a_wrong_traceparent_begins_a_new_trace(server: Server, collector: Collector) -> None:
    span = span_of(collector, ask(server, traceparent=f"00-{TRACE}-nonsense-01")["id"]).span
    assert span.trace_id.hex() != TRACE and len(span.trace_id) == 16 and span.parent_span_id == b""


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", "/v1/models", 200, "GET /v1/models"),
        ("GET", "/v1/models/org/none", 404, "GET /v1/models/{name:path}"),
        ("POST", "/v1/chat/completions", 400, "llm_request"),
        ("GET", "/nowhere", 404, "GET"),
    ],
)
def test_other_requests_are_spans_of_http(
    server: Server, collector: Collector, method: str, path: str, status: int, name: str
) -> None:
    assert httpx.request(method, server.url + path, headers=KEY).status_code == status
    found = by_path(collector, path)
    assert (found.span.name, found.attributes["http.response.status_code"]) == (name, status)
    assert found.span.status.code == Status.STATUS_CODE_UNSET, "only errors of the server make it one"
    assert not any(key.startswith("gen_ai.") for key in found.attributes)


def test_a_refused_key_is_seen_and_probes_are_not(server: Server, collector: Collector) -> None:
    assert [httpx.get(server.url + path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
    assert httpx.get(server.url + "/version").status_code == 401
    assert by_path(collector, "/version").attributes["http.response.status_code"] == 401
    assert not {found.attributes["url.path"] for found in collector.spans} & {"/health", "/ready", "/metrics"}


def test_errors_of_the_server_and_clients_that_leave(cycle_model: Path, collector: Collector) -> None:
    endless = {**ASK, "max_tokens": 7000, "stream": True}
    traces = Traces(collector.url, "1", every_seconds=0.05)
    with serve(cycle_model, {"max_model_len": 8000}, traces=traces) as server:
        with httpx.stream("POST", server.url + "/v1/completions", json=endless) as left:
            next(left.iter_lines())
        found = span_of(collector, f"cmpl-{left.headers['x-request-id']}")
        assert found.attributes["gen_ai.response.finish_reasons"] == ["abort"]
        assert 0 < found.attributes["gen_ai.usage.completion_tokens"] < 7000

        stream = server.client().completions.create(**{k: v for k, v in endless.items() if k != "ignore_eos"})
        name = next(stream).id
        server.start(server.service.drain(0.1)).result(timeout=10)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        found = span_of(collector, name)
        assert found.span.status.code == Status.STATUS_CODE_ERROR and "shutting down" in found.span.status.message
        assert (found.attributes["error.type"], found.attributes["http.response.status_code"]) == ("Unavailable", 200)

        assert server.post("/v1/completions", ASK, headers={"X-Request-Id": "late"}).status_code == 503
        eventually(lambda: any(f.attributes.get("error.type") == "503" for f in collector.spans))
    traces.close()


@pytest.fixture(params=["refuses", "hangs"])
def dead(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a collector that takes no connection, or takes it and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if request.param == "refuses":
            listening.close()
        yield f"http://127.0.0.1:{port}"


def test_a_dead_collector_slows_nothing_down(random_model: Path, dead: str) -> None:
    traces = Traces(dead, "1", every_seconds=0.01)
    with serve(random_model, traces=traces) as server:
        for _ in range(6):
            asked = time.monotonic()
            assert len(ask(server)["choices"]) == 1
            assert time.monotonic() - asked < 3, "OpenTelemetry tries for 10 s"
    closing = time.monotonic()
    traces.close(seconds=0.1)
    assert time.monotonic() - closing < 3


def test_what_is_left_is_sent_at_the_end(random_model: Path) -> None:
    with collecting() as collector:
        traces = Traces(collector.url, "1", every_seconds=1000)
        with serve(random_model, traces=traces) as server:
            names = [ask(server)["id"] for _ in range(3)]
            assert not collector.spans
        traces.close()
        assert [len(collector.of(name)) for name in names] == [1, 1, 1] and collector.batches == 1


def test_endpoints() -> None:
    assert check_endpoint("http://collector:4318") == "http://collector:4318/v1/traces"
    assert check_endpoint("https://collector/") == "https://collector/v1/traces"
    assert check_endpoint("http://collector/api/otlp/traces?x=1") == "http://collector/api/otlp/traces?x=1"
    for wrong in ("grpc://collector:4317", "collector:4318", "http://", "", "http://c:65536", "http://[::1"):
        with pytest.raises(ValueError, match=r"otlp_traces_endpoint is '.*'; it must be a URL of OTLP over HTTP"):
            GatewayConfig(otlp_traces_endpoint=wrong)


def test_without_the_packages_the_option_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)  # as if not there
    assert GatewayConfig().otlp_traces_endpoint is None
    with pytest.raises(ValueError, match="not installed here; run pip install opentelemetry-sdk"):
        GatewayConfig(otlp_traces_endpoint="http://collector:4318")


def test_without_the_option_nothing_is_imported_or_wrapped(server: Server) -> None:
    program = "import sys, stepladder.cluster.gateway.tracing as _\n"
    program += "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert [layer.cls for layer in build_app(server.service).user_middleware] == [Gatekeeper]
