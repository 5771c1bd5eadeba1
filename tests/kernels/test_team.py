"""Threads that share a kernel's work: under the thread sanitizer, which also has to find faults that are planted."""

import shutil
import subprocess
from pathlib import Path

import pytest

from stepladder.kernels.cpu.build import HERE

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ("-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread")
JOBS = 20000
CLOSING = "turn.exchange((uint64_t)number << 32 | CLOSED, std::memory_order_acq_rel);"
FAULTS = [
    (CLOSING, ""),
    ("done.load(std::memory_order_acquire)) < n", "done.load(std::memory_order_acquire)) < n - 1"),
    ("done.load(std::memory_order_acquire)) < n", "done.load(std::memory_order_relaxed)) < n"),
    ("done.fetch_add(size, std::memory_order_acq_rel)", "done.fetch_add(size, std::memory_order_relaxed)"),
    ("turn.compare_exchange_strong(now, now + size, std::memory_order_acq_rel)", "(turn.store(now + size), true)"),
    ("|| !mine.try_lock()", ""),
]


def stress(folder: Path, fault: tuple[str, str] | None = None) -> Path:
    """The program, with one place of the source changed."""
    source = (HERE / "team.cpp").read_text()
    if fault:
        assert source.count(fault[0]) == 1
        source = source.replace(*fault)
    (folder / "team.cpp").write_text(source)
    main = Path(__file__).parent / "team_stress.cpp"
    assert COMPILER
    command = [COMPILER, *FLAGS, f"-I{HERE}", folder / "team.cpp", main, "-o", folder / "stress"]
    subprocess.run(command, check=True)
    return folder / "stress"


def run(program: Path, callers: int) -> tuple[int, str]:
    """Its exit code, and what it and the sanitizer say."""
    try:
        done = subprocess.run([program, str(callers), str(JOBS)], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return 1, "it hangs"
    return done.returncode, done.stdout + done.stderr


def sanitized(folder: Path) -> bool:
    """Whether programs with the thread sanitizer run here at all; it does not like every kernel."""
    if COMPILER is None:
        return False
    (folder / "main.cpp").write_text("int main() { return 0; }")
    try:
        subprocess.run([COMPILER, *FLAGS, folder / "main.cpp", "-o", folder / "main"], check=True, capture_output=True)
        subprocess.run([folder / "main"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        return False
    return True


@pytest.mark.parametrize("callers", [1, 3])
def test_every_number_is_computed_once_and_nothing_races(tmp_path: Path, callers: int) -> None:
    if not sanitized(tmp_path):
        pytest.skip("no thread sanitizer here")
    assert run(stress(tmp_path), callers) == (0, f"{callers * JOBS} jobs\n")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[1] or f"without {fault[0][:20]}")
def test_planted_faults_are_found(tmp_path: Path, fault: tuple[str, str]) -> None:
    if not sanitized(tmp_path):
        pytest.skip("no thread sanitizer here")
    program = stress(tmp_path, fault)
    runs = (run(program, 3) for _ in range(50))  # some need luck
    assert any(code or "WARNING: ThreadSanitizer" in said for code, said in runs)
