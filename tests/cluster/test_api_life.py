"""Clients that leave, engines that fail, servers that drain, and what the metrics say about it."""

import asyncio
import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stepladder.cluster.gateway.listening import listen
from stepladder.cluster.gateway.metrics import Metrics
from stepladder.workers.engine import EngineStats
from tests.cluster.serving import Server, eventually, serve

pytestmark = pytest.mark.timeout(60)
LONG: dict[str, Any] = {"model": "org/tiny", "prompt": "a", "temperature": 0, "max_tokens": 7000}
PHASES = ("queue", "prefill", "decode", "inference")


def samples(server: Server) -> dict[str, float]:
    """name{label values} -> value."""
    families = text_string_to_metric_families(httpx.get(server.url + "/metrics").text)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = [value for name, value in sample.labels.items() if name != "model_name"]
        assert sample.labels["model_name"] == "org/tiny"
        found[" ".join([sample.name.removeprefix("stepladder:"), *labels])] = sample.value
    return found


def next_event(lines: Any) -> dict[str, Any]:
    return json.loads(next(line for line in lines if line).removeprefix("data: "))


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
def test_a_client_that_leaves_its_stream(cycle: Server, prompt: Any) -> None:
    with httpx.stream("POST", cycle.url + "/v1/completions", json={**LONG, "prompt": prompt, "stream": True}) as stream:
        lines = stream.iter_lines()
        assert all(next_event(lines)["choices"] for _ in range(4))
        assert cycle.running == len(prompt)
    eventually(lambda: cycle.running == 0)
    eventually(lambda: len(cycle.service.in_flight) == 0)


def test_a_client_that_does_not_wait(cycle: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(cycle.url + "/v1/completions", json=LONG, timeout=0.3)
    eventually(lambda: cycle.running == 0 and len(cycle.service.in_flight) == 0)
    aborted = samples(cycle)["request_success_total abort"]
    assert aborted >= 1


@pytest.mark.parametrize("asked", [0.3, None], ids=["request", "server"])
def test_the_time_for_an_answer(cycle_model: Path, asked: float | None) -> None:
    """When it is over, the request leaves the engine, and the answer says so: as a status, or as a stream's event."""
    options = {} if asked else {"request_seconds": 0.3}
    body = {**LONG, "timeout": asked}
    with serve(cycle_model, {"max_model_len": 8000}, **options) as server:
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert "no whole answer within 0.3 s" in answer.json()["error"]["message"]
        with pytest.raises(openai.APIError, match=r"no whole answer within 0\.3 s"):
            list(server.client().completions.create(**LONG, stream=True, extra_body={"timeout": asked}))
        eventually(lambda: server.running == 0 and len(server.service.in_flight) == 0)
        assert server.post("/v1/completions", {**LONG, "max_tokens": 2, "timeout": 50}).status_code == 200
        for wrong in (0, -1, "1", 1e9):
            assert server.post("/v1/completions", {**LONG, "timeout": wrong}).json()["error"]["param"] == "timeout"


def test_an_engine_that_fails(cycle_model: Path) -> None:
    with serve(cycle_model, {"max_model_len": 8000}) as server:
        stream = server.client().completions.create(**LONG, stream=True)
        assert next(stream).choices

        def broken(plan: Any) -> Any:
            raise RuntimeError("the device is gone")

        server.backend.engine.executor.submit = broken  # type: ignore[method-assign]
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        eventually(lambda: not server.backend.ready())
        for answer in (httpx.get(server.url + "/ready"), server.post("/v1/completions", LONG)):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
            assert answer.json()["error"]["code"] == "service_unavailable"
        assert httpx.get(server.url + "/health").status_code == 200
        assert samples(server)["request_success_total error"] == 2


def test_drain_waits(cycle_model: Path) -> None:
    with serve(cycle_model) as server:
        assert httpx.get(server.url + "/ready").status_code == 200
        with httpx.stream(
            "POST", server.url + "/v1/completions", json={**LONG, "max_tokens": 300, "stream": True}
        ) as s:
            lines = s.iter_lines()
            next_event(lines)
            drained = server.start(server.service.drain(30))
            eventually(lambda: httpx.get(server.url + "/ready").status_code == 503)
            answer = server.post("/v1/completions", LONG)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert httpx.get(server.url + "/health").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        drained.result(timeout=10)
        assert server.running == 0


def test_drain_ends_what_takes_too_long(cycle_model: Path) -> None:
    with serve(cycle_model, {"max_model_len": 8000}) as server:
        stream = server.client().completions.create(**LONG, stream=True)
        next(stream)
        server.start(server.service.drain(0.2)).result(timeout=10)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        eventually(lambda: server.running == 0)


def test_request_ids(cycle: Server) -> None:
    url = cycle.url + "/v1/completions"
    body, header = {**LONG, "stream": True}, {"X-Request-Id": "trace-1"}
    with httpx.stream("POST", url, json=body, headers=header) as first:
        lines = first.iter_lines()
        one = next_event(lines)["id"]
        assert [s.request.id for s in cycle.backend.engine.scheduler.running] == ["trace-1-0"]
        with httpx.stream("POST", url, json=body, headers=header) as second:
            more = second.iter_lines()
            other = next_event(more)["id"]
            assert first.headers["x-request-id"] == second.headers["x-request-id"] == "trace-1"
            assert one == "cmpl-trace-1" != other, "the same id twice at a time is two requests"
    assert len(httpx.get(cycle.url + "/health").headers["x-request-id"]) == 32
    bad = httpx.get(cycle.url + "/version", headers={"X-Request-Id": "a b"})
    assert bad.status_code == 400 and bad.headers["x-request-id"] != "a b"
    eventually(lambda: cycle.running == 0)


def test_metrics_and_snapshot(random_model: Path) -> None:
    with serve(random_model) as server:
        client = server.client()
        client.completions.create(
            model="org/tiny", prompt=["ab", "cde"], max_tokens=10, extra_body={"ignore_eos": True}
        )
        found = samples(server)
        assert found["prompt_tokens_total"] == 5 and found["generation_tokens_total"] == 20
        assert found["request_success_total length"] == 2
        for name, count in (
            ("time_to_first_token_seconds", 2),
            ("inter_token_latency_seconds", 18),
            ("request_time_per_output_token_seconds", 2),
            ("e2e_request_latency_seconds", 2),
            ("request_queue_time_seconds", 2),
            ("request_prefill_time_seconds", 2),
            ("request_decode_time_seconds", 2),
            ("request_inference_time_seconds", 2),
        ):
            assert found[f"{name}_count"] == count and found[f"{name}_sum"] > 0
        phases = {name: found[f"request_{name}_time_seconds_sum"] for name in PHASES}
        assert phases["inference"] == pytest.approx(phases["prefill"] + phases["decode"])
        assert phases["queue"] + phases["prefill"] < found["time_to_first_token_seconds_sum"]
        assert phases["queue"] + phases["inference"] < found["e2e_request_latency_seconds_sum"]
        assert found["request_generation_tokens_sum"] == 20 and found["num_requests_in_flight"] == 0
        assert (found["request_params_n_count"], found["request_params_n_sum"]) == (2, 2)
        assert (found["request_params_max_tokens_count"], found["request_params_max_tokens_sum"]) == (2, 20)
        figures = server.service.snapshot()
        assert figures["serve/requests_finished"] == 2 and figures["serve/running"] == 0
        assert 0 < figures["serve/ttft_ms_p50"] <= figures["serve/ttft_ms_p99"]
        assert 0 < figures["serve/tpot_ms_p50"] <= figures["serve/tpot_ms_p99"]
        assert figures["serve/tokens_per_s"] > 0
        again = server.service.snapshot()
        assert again["serve/requests_finished"] == 0 and "serve/ttft_ms_p50" not in again


def test_what_was_asked_for_is_counted_per_prompt(cycle_model: Path) -> None:
    """As vLLM does: n and the longest sequence once per prompt, max_tokens of every sequence; none that was left."""
    with serve(cycle_model, {"max_model_len": 8000}) as server:
        body = {"model": "org/tiny", "prompt": ["a", "aé"], "n": 2, "max_tokens": 9, "temperature": 0}
        server.post("/v1/completions", body)
        server.post("/v1/completions", {**body, "prompt": "a", "n": 1, "max_tokens": 3, "stream": True})
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}) as left:
            next_event(left.iter_lines())
        eventually(lambda: not server.running)
        found = samples(server)
        assert [found[f"request_params_n_bucket {bound}"] for bound in ("1.0", "2.0", "+Inf")] == [1, 3, 3]
        assert found["request_max_num_generation_tokens_sum"] == 9 + 9 + 3
        assert found["request_params_max_tokens_sum"] == 4 * 9 + 3
        server.service.metrics.answered(9, [4, 6, 5])
        assert samples(server)["request_max_num_generation_tokens_sum"] == 9 + 9 + 3 + 6


def test_phases_have_vllms_buckets() -> None:
    latency = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
    bounds: dict[str, list[str]] = {}
    for family in Metrics("m").registry.collect():
        bounds[family.name] = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
    for phase in PHASES:
        assert list(map(float, bounds[f"stepladder:request_{phase}_time_seconds"][:-1])) == list(latency)


def test_engine_metrics() -> None:
    metrics = Metrics("m")

    def value(name: str, engine: str) -> float | None:
        return metrics.registry.get_sample_value(f"stepladder:{name}", {"model_name": "m", "engine": engine})

    stats = asdict(EngineStats(running=3, waiting=2, kv_usage=0.5, preemptions=4, steps=100))
    metrics.update_engines({"0": stats})
    metrics.update_engines({"0": {**stats, "steps": 110}, "1": {**stats, "running": 1}})
    assert (value("num_requests_running", "0"), value("num_requests_running", "1")) == (3, 1)
    assert value("kv_cache_usage_perc", "0") == 0.5
    assert (value("engine_steps_total", "0"), value("num_preemptions_total", "0")) == (110, 4)
    metrics.update_engines({"0": {**stats, "steps": 7, "preemptions": 0}, "1": stats})
    assert (value("engine_steps_total", "0"), value("num_preemptions_total", "0")) == (117, 4), "it was restarted"
    metrics.update_engines({"1": stats})
    assert value("num_requests_running", "0") is None and value("engine_steps_total", "0") == 117


def test_tokens_per_step() -> None:
    """A histogram that the engine keeps; with vLLM's name and buckets."""
    stats, metrics, name = EngineStats(), Metrics("m"), "stepladder:iteration_tokens_total"
    for tokens in (1, 1, 8, 9, 512, 20000):
        stats.count_step(tokens)
    metrics.update_engines({"engine-0": asdict(stats)})

    def value(suffix: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name + suffix, {"model_name": "m", "engine": "engine-0", **labels})

    found = {bound: value("_bucket", le=bound) for bound in ("1.0", "8.0", "16.0", "256.0", "512.0", "16384.0", "+Inf")}
    assert found == {"1.0": 2, "8.0": 3, "16.0": 4, "256.0": 4, "512.0": 5, "16384.0": 5, "+Inf": 6}
    assert (value("_count"), value("_sum")) == (6, 20531)
    assert b"# TYPE stepladder:iteration_tokens_total histogram" in metrics.exposition()
    metrics.update_engines({})
    assert value("_count") is None


def test_small_packets_are_not_held_back() -> None:
    async def accepted() -> int:
        nodelay: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nodelay.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listen("127.0.0.1")) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.close()
            return await nodelay

    assert asyncio.run(accepted()) == 1


def test_a_port_that_is_taken() -> None:
    taken = listen("127.0.0.1")
    taken.listen()
    with pytest.raises(ValueError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()
