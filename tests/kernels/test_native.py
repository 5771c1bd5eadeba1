"""Native kernels: against fp64, bits of a row in any company, other builds of the same source, and building them."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.kernels.cpu import build
from stepladder.kernels.cpu.native import computing
from stepladder.parallel.native import NATIVE, has_native
from tests.kernels import native_checks as checks

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no native kernels here: {build.why_not()}")

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 64, 97, 200]


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 700),
    rows=st.integers(1, 80),
    kind=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, "rms", "layer"])),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(
    outputs: int, inputs: int, rows: int, kind: tuple[bool, bool, str | None], seed: int
) -> None:
    gated, bias, norm = kind
    checks.check_product(outputs * (2 if gated else 1), inputs, rows, gated, bias, norm, seed)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rows"), [(100, 8192, 7), (576, 1536, 200), (3072, 576, 33), (70, 64, 600)]
)
def test_products_of_models_shapes(outputs: int, inputs: int, rows: int) -> None:
    checks.check_product(outputs, inputs, rows, False, True, "rms")
    checks.check_product(outputs, inputs, rows, True, False, None)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_products_have_bits_of_their_own(threads: int, gated: bool, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outputs, inputs in ((100, 64), (960, 576), (130, 1000)):
            checks.check_rows_alone(outputs, inputs, gated, dtype, ROWS[:-1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layer", [False, True])
def test_norms(layer: bool) -> None:
    for size, rows in ((1, 3), (64, 1), (67, 5), (576, 200), (4096, 9)):
        checks.check_norm(size, rows, layer)


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "size"), [(32, 16), (64, 32), (80, 1), (128, 16), (6, 5)])
def test_rotary_embedding_with_the_cache_write(dim: int, size: int, interleaved: bool, norm: str | None) -> None:
    for heads, kv_heads in ((9, 3), (4, 4), (7, 1)):
        checks.check_rotation(heads, kv_heads, dim, size, interleaved, norm)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 40)), min_size=1, max_size=6),
    heads=st.sampled_from([(9, 3), (4, 4), (7, 1), (8, 2)]),
    dim=st.sampled_from([6, 32, 64, 80, 128]),
    size=st.sampled_from([1, 5, 16, 32]),
    dtype=st.sampled_from(checks.DTYPES),
    window=st.sampled_from([None, 1, 3, 17, 100, 600]),
    seed=st.integers(0, 99),
)
def test_attention_of_any_ragged_batch(
    shapes: list[tuple[int, int]], heads: tuple[int, int], dim: int, size: int, dtype: torch.dtype, window: int | None,
    seed: int,
) -> None:  # fmt: skip
    checks.check_attention(shapes, *heads, dim, size, dtype, window, seed)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("size", [16, 32])
def test_attention_over_long_contexts(size: int, window: int | None) -> None:
    checks.check_attention([(4990, 10), (0, 1), (5000, 1), (511, 3)], 9, 3, 64, size, torch.float32, window)
    checks.check_attention([(2040, 20)], 6, 2, 80, size, torch.bfloat16, window)


@pytest.mark.parametrize("window", [None, 50, 600])
@pytest.mark.parametrize("size", [1, 7, 16, 32])
def test_rows_of_attention_have_the_same_bits_however_a_prompt_is_cut(size: int, window: int | None) -> None:
    checks.check_any_cut(0, 300, 9, 3, 64, size, window, (1, 2, 3, 7, 16, 50, 128))
    checks.check_any_cut(900, 200, 4, 4, 80, size, window, (1, 9, 33))


def run_checks(folder: Path, *flags: str, preload: str | None = None) -> None:
    """The same checks under another build, in a process of its own."""
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:protect_shadow_gap=0")
    if preload:
        environment["LD_PRELOAD"] = preload
    command = [sys.executable, "-m", "tests.kernels.native_checks", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stdout.strip() == "all close", done.stdout[-500:] + done.stderr[-3000:]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are x86 instructions")
@pytest.mark.parametrize("level", ["x86-64-v3", pytest.param("x86-64-v2", marks=pytest.mark.slow)])
def test_the_same_without_avx512(level: str, tmp_path: Path) -> None:
    """v3 is AVX2 with fused multiply-adds, v2 has neither: vectors of 8, and of 4."""
    run_checks(tmp_path, f"-march={level}")


def test_the_same_under_the_address_sanitizer(tmp_path: Path) -> None:
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("this compiler comes without its address sanitizer")
    run_checks(tmp_path, "-march=native", "-O1", "-g", "-fsanitize=address", preload=found)


def build_in(folder: str, queue: multiprocessing.Queue) -> None:
    queue.put(str(build.build(folder, (*build.FLAGS, "-O0"))))


def test_several_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=build_in, args=(str(tmp_path), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    paths = {queue.get(timeout=200) for _ in processes}
    for process in processes:
        process.join(30)
    (path,) = paths
    home = Path(path).parent
    assert sorted(one.name for one in home.iterdir()) == [build.NAME], "nothing but the library is kept"
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([home.name, f"{home.name}.lock"])


def test_without_a_compiler_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        build.Unavailable, match=r"need a C\+\+ compiler, and there is none on the path; install g\+\+$"
    ):
        build.build(str(tmp_path))


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(build.Unavailable, match=r"native CPU kernels cannot be kept: .*file"):
        build.build(str(tmp_path / "file" / "kernels"))


def test_a_source_that_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(build.Unavailable, match=r"do not compile here: .*no-such-flag"):
        build.build(str(tmp_path), (*build.FLAGS, "--no-such-flag"))
    assert [one.suffix for one in tmp_path.iterdir()] == [".lock"]


def test_auto_falls_back_and_native_refuses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert has_native("auto", "cpu", torch.bfloat16) and not has_native("torch", "cpu", torch.float32)
    assert not has_native("auto", "cuda", torch.float16)
    assert not has_native("auto", "cpu", torch.float64)
    assert "CPU ranks compute with plain torch instead of native kernels: they compute in float32" in caplog.text
    with pytest.raises(ValueError, match="need native kernels: they are for CPU ranks, and this one runs on cuda"):
        has_native(NATIVE, "cuda", torch.float32)
    monkeypatch.setattr(build, "why_not", lambda: "there is no compiler")
    assert not has_native("auto", "cpu", torch.float32)
    with pytest.raises(ValueError, match="need native kernels: there is no compiler"):
        has_native(NATIVE, "cpu", torch.float32)


def threads_of_another() -> int:
    """What a thread that is born now gives torch."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("native", [False, True])
def test_torch_is_alone_while_kernels_have_the_threads(native: bool) -> None:
    """In this thread only, whatever ends the block, and once if blocks lie in each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), computing(native):
            assert torch.is_inference_mode_enabled() and torch.get_num_threads() == (1 if native else 2)
            assert threads_of_another() == 2
            with computing(native):
                checks.check_product(100, 64, 200, False, True, "rms")
            assert torch.get_num_threads() == (1 if native else 2)
            raise KeyError
        assert torch.get_num_threads() == 2 and not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(before)
