"""`launch.fetch`, as a person runs it."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stepladder import LLM, SamplingParams
from stepladder.launch.fetch import FetchConfig, Wanted
from stepladder.launch.serve import check_here, deployment_of
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.source.packaged import SMOLLM2
from tests.composed import composed
from tests.gguf_files import Q8_0, write_checkpoint, write_gguf
from tests.smollm2 import ROOT, fetch

CUT_OFF = {**os.environ, "PIP_NO_INDEX": "1"}


def test_smollm2_answers(smollm2: Path) -> None:
    llm = LLM("smollm2", "cpu", cache=str(smollm2.parent))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    [got] = llm.chat(chat, SamplingParams(max_tokens=32, temperature=0.0))
    assert got.text == "The capital of France is Paris." and got.finish_reason == "stop"
    assert "Apache License" in (smollm2 / "LICENSE").read_text()


def test_a_second_call_needs_no_index(smollm2: Path) -> None:
    done = fetch(smollm2.parent, env=CUT_OFF)
    assert (done.returncode, done.stdout) == (0, f"smollm2: {smollm2}\n"), done.stderr


def test_without_an_index(tmp_path: Path) -> None:
    done = fetch(tmp_path, env=CUT_OFF)
    assert done.returncode == 1 and done.stderr.startswith("stepladder: smollm2 could not be fetched: `")
    assert f"put {SMOLLM2.wheel} into {tmp_path}" in done.stderr and done.stderr.count("\n") == 1


def test_serving_fetches_on_first_use(tmp_path: Path) -> None:
    """And says so before anything is started, where that cannot be."""
    words = ["model=smollm2", f"model.cache={tmp_path}", "run_dir=/r"]
    deployment = deployment_of(composed("serve", *words))
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        with pytest.raises(ValueError, match="smollm2 could not be fetched"):
            check_here(deployment)
    finally:
        del os.environ["PIP_NO_INDEX"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "tiny.gguf", write_checkpoint(folder, "llama"), Q8_0)


def test_two_at_once_convert_one_file(gguf: Path, tmp_path: Path) -> None:
    words = ["model=path", f"model.path={gguf}", "model.name=tiny", "dtype=bfloat16"]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: fetch(tmp_path, *words), range(2)))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert str(ModelSpec.load(folder).dtype) == "torch.bfloat16"
    assert {one.stdout.splitlines()[-1] for one in done} == {f"tiny: {folder}"}
    assert sum("its weights take" in one.stdout for one in done) == 1, "one of them waited"


def test_generate_takes_a_gguf_file(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello world\nhello\n")
    words = ["model=path", f"model.path={gguf}", "model.name=tiny", f"model.cache={tmp_path / 'models'}"]
    words += [f"prompts={tmp_path / 'p.txt'}", "sampling.max_tokens=4", "device=cpu"]
    command = [sys.executable, "-m", "launch.generate", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "p.txt.out.jsonl").read_text().splitlines()) == 2


def test_a_broken_file_is_one_sentence(gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copy(gguf, broken)
    os.truncate(broken, 100_000)
    done = fetch(tmp_path / "models", "model=path", f"model.path={broken}", "model.name=x")
    assert done.returncode == 1 and done.stderr.startswith(f"stepladder: {broken} is cut off, broken or")
    assert done.stderr.count("\n") == 1


def test_defaults() -> None:
    assert FetchConfig(model=Wanted(path="a", name="b")).model.cache == "~/.cache/stepladder/models"
