"""Compiles the kernels for this machine: once, on first use or ahead by `python -m launch.build`."""

import hashlib
import logging
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from time import monotonic

import torch

from stepladder.kernels.once import made_once

log = logging.getLogger(__name__)

CACHE = "~/.cache/stepladder/kernels"
SOURCES = ("library", "attention", "draw", "experts", "products", "recurrent", "rows", "team")
HERE, NAME = Path(__file__).parent, "stepladder_cpu.so"
FLAGS: tuple[str, ...] = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
FLAGS += ("-ffp-contract=off", "-Wno-psabi", "-Wno-ignored-attributes", "-march=native")


class Unavailable(RuntimeError):
    """There are no native kernels on this machine; one sentence says why."""


@cache
def load() -> None:
    """`torch.ops.stepladder_cpu`, compiled first if this machine has not done so yet.

    Raises:
        Unavailable: each time it is called.
    """
    torch.ops.load_library(str(build()))


def why_not() -> str | None:
    """Why there are no native kernels here; None if there are."""
    try:
        load()
    except Unavailable as error:
        return str(error)
    return None


def build(folder: str = CACHE, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library. Whoever comes while another process compiles waits for it.

    Raises:
        Unavailable: no compiler, no place to put it, or it does not compile.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("native CPU kernels need a C++ compiler, and there is none on the path; install g++")
    flags += ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    home = Path(folder).expanduser() / _key(compiler, flags)
    try:
        return made_once(home, lambda partial: _compile(compiler, flags, partial)) / NAME
    except ValueError as error:
        raise Unavailable(f"native CPU kernels cannot be kept: {error}") from None


def _compile(compiler: str, flags: tuple[str, ...], folder: Path) -> None:
    began = monotonic()
    log.warning("compiling native kernels for this machine's CPU, once; about half a minute")
    torch_home = Path(torch.__file__).parent
    headers = [torch_home / "include", torch_home / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    includes = [f"-isystem{path}" for path in headers]
    running = [
        subprocess.Popen(
            [compiler, *flags, *includes, "-c", HERE / f"{name}.cpp", "-o", folder / f"{name}.o"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in SOURCES
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    for process, text in zip(running, said, strict=True):
        _check(process.returncode, text)
    objects, libraries = [folder / f"{name}.o" for name in SOURCES], torch_home / "lib"
    link: list[str | Path] = [
        compiler,
        *flags,
        "-shared",
        *objects,
        f"-L{libraries}",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        folder / NAME,
    ]
    done = subprocess.run(link, capture_output=True, text=True)
    _check(done.returncode, done.stdout + done.stderr)
    for path in objects:
        path.unlink()
    log.info("compiled in %.0f s", monotonic() - began)


def _check(code: int, said: str) -> None:
    if code:
        first = next((line for line in said.splitlines() if "error" in line.lower()), said[:200] or f"exit code {code}")
        raise Unavailable(f"native CPU kernels do not compile here: {first.strip()}")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """What a compiled library depends on. Homes are shared by machines, and `-march=native` is of one."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, *flags, torch.__version__, platform.machine(), *_cpu()]
    parts += [path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".cpp", ".h")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _cpu() -> Iterator[str]:
    """What this CPU can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    found = [line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part"))]
    yield from sorted({*found})
