"""suite=engine on a tiny model: real engines where they can be here, a script that speaks the protocol where not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.engine import attention, beside, products
from stepladder.launch.bench.engine.beside import Case
from stepladder.launch.bench.engine.bounds import ROWS, Products, read_bandwidth
from stepladder.launch.bench.engine.engines import LlamaCpp, ProcessEngine, ours, seconds
from stepladder.launch.bench.engine.suite import found, run
from stepladder.launch.bench.engine.work import Work, works
from stepladder.launch.report import Report, publish
from stepladder.launch.where import BUNDLED, CONF
from stepladder.parallel.spec import ModelSpec
from tests.cluster.models import write_random
from tests.composed import composed

# what llama-batched-bench of llama.cpp b11434 printed, all of it
SAMPLE = """
{"n_kv_max": 512, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 7, "pl": 2, "n_kv": 46, "t_pp": 0.358067, \
"speed_pp": 89.368752, "t_tg": 0.615777, "speed_tg": 22.735502, "t": 0.973844, "speed": 47.235489}
"""
SPEAKS = f"""#!{sys.executable}
import json, sys
print("{{}}", flush=True)
for line in sys.stdin:
    work = json.loads(line)
    print("loaded", len(work["prompts"]), file=sys.stderr, flush=True)
    print(json.dumps({{"seconds": 100.0 + sum(work["lengths"])}}), flush=True)
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder like that of a build; its program prints the sample, and what it was called with to a file."""
    folder = tmp_path / "llama"
    program(folder / "bin/llama-batched-bench", f"#!/bin/sh\necho $@ >> {folder}/words\ncat {folder}/sample\n")
    for name, text in (("sample", SAMPLE), ("F32.gguf", ""), ("F16.gguf", "")):
        (folder / name).write_text(text)
    return folder


def options(run_dir: Path, *words: str) -> Any:
    return suite_of(composed("bench", "suite=engine", f"run_dir={run_dir}", "repeats=1", *words))[0]


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of all parts but `serving`, which starts a Ray."""
    folder = tmp_path_factory.mktemp("run")
    vllm = program(folder / "python", SPEAKS)
    parts = "parts=[cases,products,attention,neighbours]"
    words = ["model=path", f"model.path={model}", "model.name=tiny", parts, "scale=0.02"]
    words += ["shapes=[[100,64],[64,32]]", "rows=[1,3,64]", f"peers.vllm={vllm}"]
    return run(options(folder, *words))


def test_a_run_has_every_engine_beside_ours(report: Report) -> None:
    turns = report.details["turns"]
    assert [name[0] for name in turns] == [letter for letter in "ABCDE" for _ in range(2)]
    for name, sides in turns.items():
        assert [len(sides[side]) for side in ("ours", "transformers", "vllm")] == [1, 1, 1], name
        assert sides["vllm"][0] >= 101, "the script's own word"
        assert sides["ours"][0] > 0 and sides["memory"] > 0 and sides["products"] > 0, name
    rows = {(row.case, row.metric): row for row in report.rows}
    row = rows["B (16, 64 + 64) float32", "time of transformers"]
    times = turns["B (16, 64 + 64) float32"]
    assert (row.value, row.rival) == (times["transformers"][0], times["ours"][0])
    assert rows["B (16, 64 + 64) float32", "time beside its products"].bound == times["products"]
    ratio = report.summary["B (16, 64 + 64) float32: transformers / ours"]
    assert ratio.goal == ">= 2" and ratio.value == pytest.approx(times["transformers"][0] / times["ours"][0])
    assert "B (16, 64 + 64) bfloat16: transformers / ours" not in report.summary, "there is no goal"
    assert report.summary["E (prefill of 1,000) bfloat16 / float32"].goal == "<= 1.05"


def test_a_run_has_kernels_beside_torchs(report: Report) -> None:
    times = report.details["products"]["100 x 64 bfloat16"]
    assert set(times) == {1, 3, 64} and all(own > 0 and other > 0 for own, other in times.values())
    goals = {name: goal.goal for name, goal in report.summary.items() if "A (" not in name and "/" not in name}
    assert goals == {
        "products float32, 1 to 32 rows: slowest beside oneDNN": ">= 1",
        "products float32, 64 to 512 rows: slowest beside oneDNN": ">= 0.92",
        "products bfloat16, 1 to 32 rows: slowest beside oneDNN": "no bar",
        "products bfloat16, 64 to 512 rows: slowest beside oneDNN": "no bar",
    }
    times = [report.details["products"][f"{shape} float32"] for shape in ("100 x 64", "64 x 32")]
    worst = min(other / own for some in times for rows, (own, other) in some.items() if rows < 64)
    assert report.summary["products float32, 1 to 32 rows: slowest beside oneDNN"].value == worst
    assert sum(name.startswith("attention, ") for name in report.summary) == 8


def test_a_run_has_a_request_beside_busy_processes(report: Report) -> None:
    (row,) = (row for row in report.rows if row.metric == "time beside 2 busy processes")
    assert row.rival and row.value and row.rival > 0
    assert report.summary["A (one, 64 + 128) float32, beside busy processes / alone"].goal == "<= 4"


def test_it_is_written_and_drawn(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.emulated == "all lengths are multiplied by 0.02" and not report.titled
    publish(report, ["suite=engine"], tmp_path)
    assert (tmp_path / "engine.png").stat().st_size > 10_000
    assert set(json.loads((tmp_path / "engine-turns.json").read_text())) == set(report.details["turns"])
    printed = capsys.readouterr().out
    assert printed.split("\nsummary ")[1].count("\n") == 1 + len(report.summary)


def test_llama_cpp_runs_what_it_can_be_given(llama_cpp: Path) -> None:
    given = works(300, seed=1)
    with LlamaCpp(str(llama_cpp), "bfloat16", 2) as engine:
        assert engine.run(given["C"]) is None and engine.run(given["D"]) is None
        assert engine.run(given["B"]) == {"seconds": 0.358067 + 0.615777}
        assert engine.run(given["E"]) == {"seconds": 0.358067}, "its one token comes of the prompt"
    called = [line.split() for line in (llama_cpp / "words").read_text().splitlines()]
    wanted = [("64", "63", "16", "4096"), ("1000", "1", "1", "1024")]
    for words, sizes in zip(called, wanted, strict=True):
        assert words == [
            "-m", f"{llama_cpp}/F16.gguf", "-npp", sizes[0], "-ntg", sizes[1], "-npl", sizes[2], "-c", sizes[3],
            "-t", "2", "-tb", "2", "--output-format", "jsonl",
        ]  # fmt: skip


def test_what_llama_cpp_prints() -> None:
    assert seconds(SAMPLE, output=8) == pytest.approx(0.973844)
    with pytest.raises(RuntimeError, match="no times: error: failed to load"):
        seconds("error: failed to load\n", output=8)


def test_the_cases() -> None:
    first, again, other = (works(49152, seed) for seed in (1, 1, 2))
    assert first == again
    for letter, work in first.items():
        assert [*map(len, work.prompts)] == [*map(len, other[letter].prompts)] and work.lengths == other[letter].lengths
        assert all(a != b for a, b in zip(work.prompts, other[letter].prompts, strict=True)), "no prefix is found again"
        assert all(0 <= token < 49152 for prompt in work.prompts for token in prompt)
    assert {name: work.equal for name, work in first.items()} == {
        "A": (64, 128, 1), "B": (64, 64, 16), "C": None, "D": None, "E": (1000, 1, 1),
    }  # fmt: skip
    assert len(first["C"].prompts) == 32 and all(16 <= len(prompt) <= 384 for prompt in first["C"].prompts)
    prefixes = {tuple(prompt[:512]) for prompt in first["D"].prompts}
    assert len(prefixes) == 1 and len(first["D"].prompts) == 16 and {*map(len, first["D"].prompts)} == {544}
    assert works(49152, 1, scale=0.001)["A"].equal == (1, 1, 1)


def test_bounds_by_hand() -> None:
    known = Products([float(rows) for rows in ROWS], [0.5] * len(ROWS), blocks_bytes=100, head_bytes=7)
    steps = [[5, 1, 2], [512, 0, 1]]  # two steps of five rows with one logit, one of 512 without
    assert known.seconds(steps) == 2 * (5.0 + 0.5) + 512.0
    assert known.bytes_read(steps) == 2 * 107 + 100
    assert 1e8 < read_bandwidth(repeats=1) < 1e13


def test_ratios_by_hand() -> None:
    wide = Case("A", "float32", {"ours": [1.0, 2.0, 4.0], "vllm": [3.0, 4.0, 4.0]})
    half = Case("A", "bfloat16", {"ours": [2.0, 2.0, 2.0], "llama.cpp": [1.0, 2.0, 3.0]})
    assert (wide.time(), wide.time("vllm"), wide.ratio("vllm"), wide.ratio("transformers")) == (2.0, 4.0, 2.0, None)
    rows = [row for row in beside.rows([wide, half]) if row.metric == "time of llama.cpp F16"]
    assert [(row.value, row.rival) for row in rows] == [(2.0, 2.0)]
    assert [row.value for row in beside.rows([wide, half]) if row.metric == "time of vllm"] == [4.0, None]
    held = {name: (goal.value, goal.goal, goal.holds) for name, goal in beside.summary([wide, half])}
    assert held == {
        "A (one, 64 + 128) float32: vllm / ours": (2.0, ">= 2", True),
        "A (one, 64 + 128) bfloat16: llama.cpp F16 / ours": (1.0, ">= 0.95", True),
        "A (one, 64 + 128) bfloat16 / float32": (1.0, "<= 1.05", True),
    }


def test_our_steps_are_counted(model: Path, tmp_path: Path) -> None:
    """A prefill that nothing is wanted of but its last row, and a decode step for each token that follows."""
    with ours(model, "float32", 1, tmp_path / "log") as engine:
        answer = engine.run(Work([[5] * 20, [6] * 30], [4, 4]))
    assert answer and sorted(answer["steps"]) == [[2, 2, 3], [50, 2, 1]]


@pytest.fixture
def speaking(tmp_path: Path) -> Iterator[ProcessEngine]:
    with ProcessEngine([str(program(tmp_path / "speaks", SPEAKS))], tmp_path / "log") as engine:
        yield engine


def test_only_the_one_whose_turn_it_is_runs(speaking: ProcessEngine, tmp_path: Path) -> None:
    process = psutil.Process(speaking._process.pid)
    for _ in range(2):
        assert speaking.run(Work([[1], [2]], [3, 4])) == {"seconds": 107.0}
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # which takes no time, but not none
        assert process.status() == psutil.STATUS_STOPPED
    assert (tmp_path / "log").read_text() == "loaded 2\n" * 2
    speaking.__exit__()
    assert not process.is_running() and speaking._process.returncode == 0, "it ended by itself"


def test_one_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    for dies in ('echo "no such model" >&2; exit 3', 'echo {}; read line; echo "no such model" >&2'):
        path = program(tmp_path / "dies", f"#!/bin/sh\n{dies}\n")
        with (
            pytest.raises(RuntimeError, match=r"/dies ended; it said: no such model \(all of it: "),
            ProcessEngine([str(path)], tmp_path / "log") as engine,
        ):
            engine.run(Work([[1]], [1]))
    with pytest.raises(ValueError, match=r"peers\.vllm: /nowhere is not a program"):
        run(options(tmp_path, "model=demo", "parts=[cases]", "peers.vllm=/nowhere"))
    with pytest.raises(ValueError, match=r"peers\.llama_cpp: there is no .*llama-batched-bench"):
        run(options(tmp_path, "model=demo", "parts=[cases]", f"peers.llama_cpp={tmp_path}"))


def test_a_stopped_engine_does_not_outlive_a_killed_bench(tmp_path: Path) -> None:
    program(tmp_path / "speaks", SPEAKS)
    code = f"""
import os, signal
from pathlib import Path
from stepladder.launch.bench.engine.engines import ProcessEngine
engine = ProcessEngine(["{tmp_path}/speaks"], Path("{tmp_path}/log")).__enter__()
print(engine._process.pid, flush=True)
os.waitid(os.P_PID, engine._process.pid, os.WSTOPPED)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(CONF).parents[1])
    assert done.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(timeout=60)


@torch.inference_mode()
def test_what_is_compared_computes_the_same(model: Path) -> None:
    x, weight = torch.randn(3, 64), torch.randn(100, 64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        packed = products.one_dnn(weight.to(dtype))(x.to(dtype))
        torch.testing.assert_close(packed.float(), F.linear(x, weight), atol=tolerance, rtol=0)
    own, plain = attention.ways(ModelSpec.load(model), [0, 40, 7], [30, 1, 5])
    torch.testing.assert_close(own(), plain().flatten(1), atol=1e-5, rtol=0)


def test_without_the_packaged_model_the_bundled_one_is_measured(tmp_path: Path) -> None:
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        path, instead = found(options(tmp_path, f"model.cache={tmp_path}"))
    finally:
        del os.environ["PIP_NO_INDEX"]
    assert path == BUNDLED and instead and instead.startswith("the bundled model in place of smollm2")
    with pytest.raises(ValueError, match="is not a directory"):
        found(options(tmp_path, "model=path", "model.path=/nowhere", "model.name=x"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["parts=[kases]"], "parts has 'kases'; it takes cases, products, attention, neighbours, serving"),
        (["cases=[A,F]"], "cases has 'F'; it takes A, B, C, D, E"),
        (["dtypes=[float16]"], "dtypes has 'float16'; it takes float32, bfloat16"),
        (["scale=0"], "scale is 0"),
        (["threads=0"], "threads is 0; it must be at least 1"),
        (["+peers.sglang=x"], "peers.sglang is not an option; peers takes llama_cpp, transformers, vllm"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        options(tmp_path, *words)
