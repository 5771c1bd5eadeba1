"""The load generator against a real server: vLLM's keys, vLLM's formulas, and honest queues."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.serve.load import Case, apply
from stepladder.launch.bench.serve.measures import peak_chunks, peak_concurrency, result
from stepladder.launch.bench.serve.prompts import from_file
from stepladder.launch.bench.serve.suite import ServeBench, run
from stepladder.launch.report import Report, Row, at_least, at_most, publish
from stepladder.launch.streaming import Timing
from tests.cluster.models import write_random
from tests.cluster.serving import Server, serve
from tests.composed import composed

# of `vllm bench serve`, as it writes them (vllm/benchmarks/serve.py), with --percentile-metrics ttft,tpot,itl,e2el
VLLM_KEYS = {
    "date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration",
    "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests", "input_lens",
    "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts", "errors",
} | {
    f"{statistic}_{metric}_ms"
    for statistic in ("mean", "median", "std", "p50", "p90", "p99")
    for metric in ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(write_random(tmp_path_factory.mktemp("model")), api_key="k", max_in_flight=16) as server:
        yield server


def options(server: Server, run_dir: Path, *words: str) -> ServeBench:
    given = [f"base_url={server.url}", "api_key=k", f"run_dir={run_dir}", "prompts.input_tokens=20", *words]
    return suite_of(composed("bench", "suite=serve", "prompts.output_tokens=8", *given))[0]


def test_a_run_has_vllms_keys_and_they_agree(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cases.open.request_rate=40", "cases.open.num_requests=12", "cases.closed.num_requests=9"]
    words += ["cases.closed.max_concurrency=3", "+goodput.ttft=60000", "+goodput.e2el=60000"]
    report = run(options(server, tmp_path, *words))
    assert set(report.details) == {"open", "closed"}
    for name, count in {"open": 12, "closed": 9}.items():
        figures: Any = report.details[name]
        assert set(figures) == VLLM_KEYS
        assert (figures["completed"], figures["failed"], figures["errors"]) == (count, 0, [""] * count)
        assert all(6 <= n <= 10 for n in figures["output_lens"])
        assert figures["total_input_tokens"] == sum(figures["input_lens"])
        assert all(15 <= n <= 25 for n in figures["input_lens"]), "20 tokens, spread by a quarter"
        _check_times(figures)
        assert report.summary[f"{name}: failed requests"].holds
        assert report.summary[f"{name}: share of good requests"].value == 1.0
    assert report.details["closed"]["max_concurrent_requests"] <= 3
    publish(report, ["suite=serve", "api_key=k"], tmp_path)
    assert "figures under vLLM's keys in serve-open.json, serve-closed.json beside it" in capsys.readouterr().out
    assert "api_key=***" in json.loads((tmp_path / "serve.json").read_text())["command"]
    written = json.loads((tmp_path / "serve-open.json").read_text())
    assert written == json.loads(json.dumps(report.details["open"]))


def _check_times(figures: dict[str, Any]) -> None:
    """The aggregates are those of the lists, by vLLM's formulas."""
    lists = zip(figures["ttfts"], figures["latencies"], figures["output_lens"], figures["itls"], strict=True)
    tpots = []
    for ttft, latency, length, gaps in lists:
        assert 0 < ttft <= latency and sum(gaps) <= latency - ttft + 1e-9 and len(gaps) < length
        tpots.append((latency - ttft) / (length - 1))
    wanted = {
        "ttft": figures["ttfts"],
        "tpot": tpots,
        "itl": [gap for gaps in figures["itls"] for gap in gaps],
        "e2el": figures["latencies"],
    }
    for metric, values in wanted.items():
        assert figures[f"mean_{metric}_ms"] == pytest.approx(1000 * np.mean(values))
        assert figures[f"median_{metric}_ms"] == figures[f"p50_{metric}_ms"] == pytest.approx(1000 * np.median(values))
        assert figures[f"std_{metric}_ms"] == pytest.approx(1000 * np.std(values))
        assert figures[f"p99_{metric}_ms"] == pytest.approx(1000 * np.percentile(values, 99))
    seconds = figures["duration"]
    assert figures["request_throughput"] == pytest.approx(figures["completed"] / seconds)
    assert figures["request_goodput"] == pytest.approx(figures["request_throughput"])
    assert figures["output_throughput"] == pytest.approx(figures["total_output_tokens"] / seconds)
    both = figures["total_output_tokens"] + figures["total_input_tokens"]
    assert figures["total_token_throughput"] == pytest.approx(both / seconds)


def test_failures_are_counted_with_their_reason(server: Server, tmp_path: Path) -> None:
    """Thirty at once, where the server takes sixteen."""
    words = ["~cases.closed", "cases.open.request_rate=null", "cases.open.num_requests=30"]
    report = run(options(server, tmp_path, *words, "prompts.output_tokens=60"))
    figures: Any = report.details["open"]
    assert figures["failed"] >= 1 and figures["completed"] == 30 - figures["failed"]
    assert {error for error in figures["errors"] if error} == {"HTTP 429: the queue is full"}
    assert not report.summary["open: failed requests"].holds
    assert figures["total_output_tokens"] == sum(figures["output_lens"]) <= 75 * figures["completed"]


def test_a_dataset_of_prompts_and_conversations(server: Server, tmp_path: Path) -> None:
    lines = [{"prompt": "hello", "output_tokens": 3}, {"messages": [{"role": "user", "content": "hello"}]}]
    dataset = tmp_path / "d.jsonl"
    dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"prompts.dataset={dataset}", "~cases.open", "cases.closed.num_requests=4"]
    figures: Any = run(options(server, tmp_path, *words, "num_warmups=0")).details["closed"]
    assert figures["output_lens"] == [3, 8, 3, 8] and figures["input_lens"][0] == 5 < figures["input_lens"][1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["api_key=wrong"], "/v1/models does not answer as it should: 401"),
        (["api_key=wrong", "model_name=org/tiny"], "/tokenize does not answer as it should: 401"),
        (
            ["model_name=other", "prompts.dataset=DATASET"],
            "did not answer a warm-up request: HTTP 404: the model 'other'",
        ),
        (["prompts.dataset=/nowhere"], "prompts.dataset: there is no file /nowhere"),
        (["+goodput.itl=3"], "goodput.itl is not an option; goodput takes ttft, tpot, e2el"),
        (["cases.open.request_rate=0"], "a case's request_rate is 0"),
        (["+cases.open.rate=1"], "cases.open.rate is not an option"),
        (["cases={}", "~cases.open", "~cases.closed"], "cases is empty"),
        (["percentiles=[101]"], "percentiles is [101.0]"),
        (
            ["name=sreve"],
            "name is 'sreve'; the suites are afd, dispatch, engine, failures, fp8, hostile, learning, moe, overlap, "
            "serve, shift, speculate",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    server: Server, tmp_path: Path, words: list[str], sentence: str
) -> None:
    (tmp_path / "d").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError) as error:
        run(options(server, tmp_path, *(word.replace("DATASET", str(tmp_path / "d")) for word in words)))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_arrivals_are_gamma_and_end_when_the_rate_says() -> None:
    poisson = Case(request_rate=50.0, num_requests=4000).arrivals(seed=1)
    gaps = np.diff([0.0, *poisson])
    assert poisson[-1] == pytest.approx(4000 / 50) and np.all(gaps >= 0)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, rel=0.1)
    bursty = np.diff([0.0, *Case(request_rate=50.0, burstiness=0.25, num_requests=4000).arrivals(seed=1)])
    assert np.std(bursty) / np.mean(bursty) == pytest.approx(2.0, rel=0.1), "1 / sqrt(burstiness)"
    assert Case(num_requests=3).arrivals(seed=1) == [0.0] * 3
    assert poisson == Case(request_rate=50.0, num_requests=4000).arrivals(seed=1)


def test_the_clients_queue_is_kept_apart_from_the_servers_latency() -> None:
    """Ten requests due at once through one connection to a server that takes 20 ms: it is not slower for the last."""

    async def send(_: object) -> Timing:
        timing = Timing(start_time=asyncio.get_running_loop().time(), ttft=0.01, prompt_tokens=1, output_tokens=1)
        await asyncio.sleep(0.02)
        timing.latency = 0.02
        return timing

    case = Case(request_rate=10_000.0, max_concurrency=1, num_requests=10)
    timings, seconds = asyncio.run(apply(case, 0, range(10), send))
    figures = result(timings, seconds, {}, [99.0])
    assert seconds >= 0.2 and figures["max_concurrent_requests"] == 1
    assert figures["mean_e2el_ms"] == pytest.approx(20)
    assert figures["p99_client_queue_time_ms"] >= 150
    assert figures["p99_e2el_including_client_queue_ms"] == pytest.approx(figures["p99_client_queue_time_ms"] + 20)
    assert figures["request_goodput"] is None


def test_peaks() -> None:
    timings = [Timing(start_time=s, ttft=0.1, itl=[0.2, 0.3], latency=1.0, output_tokens=3) for s in (5.0, 5.5, 6.0)]
    assert peak_concurrency(timings) == 2, "one ends as the third begins"
    assert peak_chunks(timings) == 5.0  # 5.1 5.3 5.6 5.6 5.8 | 6.1 6.1 6.3 6.6
    assert peak_concurrency([]) == 0 and peak_chunks([]) == 0.0


def test_goodput_counts_requests_within_every_limit() -> None:
    def timing(ttft: float, latency: float, tokens: int) -> Timing:
        return Timing(ttft=ttft, latency=latency, output_tokens=tokens, itl=[0.01])

    timings = [timing(0.1, 1.0, 10), timing(0.3, 1.0, 10), timing(0.1, 5.0, 10), timing(0.1, 0.1, 1), Timing(error="x")]
    figures = result(timings, 2.0, {"ttft": 200.0, "tpot": 100.0}, [])
    assert figures["request_goodput"] == 1.0, "the first and the fourth; a single token has no TPOT"
    assert (figures["completed"], figures["failed"]) == (4, 1)


def test_the_common_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("a", "speed", 8.0, "tokens/s", bound=10.0, rival=4.0), Row("b", "speed", None, "tokens/s")]
    rows.append(Row("c", "gain", 1.5, "x", interval=(1.25, 1.75)))
    report = Report("demo", rows, {"fast": at_least(8.0, 9), "small": at_most(None, 3)}, emulated="links of 1 ms")
    publish(report, ["suite=demo", "a=b c"], tmp_path)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert set(written) == {"suite", "command", "machine", "emulated", "rows", "summary"}
    assert written["command"] == "python -m launch.bench suite=demo 'a=b c'"
    assert written["rows"][0] == {
        "case": "a", "metric": "speed", "value": 8.0, "unit": "tokens/s", "bound": 10.0, "rival": 4.0,
        "ratio_to_bound": 0.8, "ratio_to_rival": 2.0,
    }  # fmt: skip
    assert written["rows"][1]["ratio_to_bound"] is None and written["rows"][2]["interval"] == [1.25, 1.75]
    assert written["summary"] == {
        "fast": {"value": 8.0, "goal": ">= 9", "holds": False},
        "small": {"value": None, "goal": "<= 3", "holds": False},
    }
    assert (tmp_path / "demo.png").stat().st_size > 1000
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert any("1.5 (1.25 to 1.75)" in line for line in printed)
    assert printed[-3].split() == ["summary", "value", "goal", "holds"] and "emulated: links of 1 ms" in printed


def test_a_dataset_line_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="line 2: give either prompt or messages"):
        from_file(tmp_path / "d", 4)
