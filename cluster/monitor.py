"""Where figures go: a JSONL file always, Weights & Biases where it is wanted and works.

Whoever logs has already aggregated: one row every few seconds or steps, never one per token or request.
"""

import errno
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)
CLOCKS = {  # what W&B plots each family of figures over; serving, training and drafters have clocks of their own
    **dict.fromkeys(("serve/*", "engine/*", "afd/*", "ranks/*", "spec/*", "lease/*"), "serve/seconds"),
    **dict.fromkeys(("train/*", "held_out/*"), "train/step"),
    "drafter/*": "drafter/version",
}
INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0
RUN_ID = "wandb-run-id.txt"


def open_monitor(directory: Path, wandb: str, project: str, name: str, config: Mapping[str, Any]) -> "Monitors":
    """The monitor of one job.

    Args:
        directory: absolute; holds metrics.jsonl and W&B's own folder.
        wandb: "online", "offline" or "disabled".
        project, name: of the W&B run.
        config: shown beside the run; no secrets.
    """
    jsonl = JsonlMonitor(directory / "metrics.jsonl")
    return Monitors(jsonl, *([] if wandb == "disabled" else [WandbMonitor(directory, wandb, project, name, config)]))


class Monitors:
    """Every row to each of `monitors`."""

    def __init__(self, *monitors: "JsonlMonitor | WandbMonitor") -> None:
        self._monitors = monitors

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of figures under namespaced names ("train/loss"). Never raises because a service is away or a disk
        full."""
        for monitor in self._monitors:
            monitor.log(row)

    def log_version(self, number: int, folder: Path, scores: Mapping[str, float], aliases: Sequence[str]) -> None:
        """A version of a drafter, with what it is called now. Never raises, as `log`."""
        for monitor in self._monitors:
            monitor.log_version(number, folder, scores, aliases)

    def close(self) -> None:
        for monitor in self._monitors:
            monitor.close()


class JsonlMonitor:
    """One JSON object per line, with the Unix time; rows of an earlier run in the same file stay.

    A row that the disk does not take is lost; the next one is tried again.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._failing = path, False
        self._file: FileIO | None = None
        with suppress(OSError):  # `log` tries again, and tells
            self._append(b"")

    def log(self, row: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **row}) + "\n"
        try:
            self._append(line.encode())
            self._failing = False
        except OSError as error:
            if not self._failing:
                LOG.error("%s cannot be written (%s); going on without", self._path, error.strerror or error)
            self._failing = True

    def log_version(self, number: int, folder: Path, scores: Mapping[str, float], aliases: Sequence[str]) -> None:
        """Rows are figures over time only; the version lies beside them."""

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _append(self, line: bytes) -> None:
        """Unbuffered, so that a row is there at once and whole, or not at all."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) != len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class WandbMonitor:
    """One W&B run, kept by one process of the job. A job that is started again in the same directory continues it: its
    id lies there.

    A missing key, a missing network or any other failure of W&B is a warning: online falls back to offline (a run
    directory that `wandb sync` sends later), and a failure after that ends the logging, not the work.

    Args:
        directory: absolute, since a Ray job's working directory is temporary; W&B writes to `directory`/wandb.
        mode: "online" or "offline"; offline needs no network.
    """

    def __init__(self, directory: Path, mode: str, project: str, name: str, config: Mapping[str, Any]) -> None:
        assert directory.is_absolute()
        self._run: Any = None
        failed = list[str]()
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._run = _start(directory, attempt, project, name, config)
                break
            except Exception as error:  # W&B promises no common base class
                failed.append(f"W&B in mode {attempt} does not start ({_one_line(error)})")
        if failed:
            instead = "the run is offline, `wandb sync` sends it" if self._run else "figures go to metrics.jsonl only"
            LOG.warning("%s; %s", "; ".join(failed), instead)

    def log(self, row: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(row))
        except Exception as error:
            LOG.warning("W&B fails (%s); figures go to metrics.jsonl only from here", _one_line(error))
            self._run = None

    def log_version(self, number: int, folder: Path, scores: Mapping[str, float], aliases: Sequence[str]) -> None:
        """An artifact of the type "drafter", whose aliases are taken from those that had them. An offline run notes the
        hashes of its files and where they lie, and copies nothing: there is no end to versions."""
        if self._run is None:
            return
        try:
            self._run.log_artifact(_artifact(self._run, number, folder, scores), aliases=[*aliases, f"number-{number}"])
        except Exception as error:
            LOG.warning("W&B does not take version %d of the drafter (%s)", number, _one_line(error))

    def close(self) -> None:
        """Finish the run; an upload that takes longer than 30 s is left to `wandb sync`."""
        if self._run is not None:
            finish = threading.Thread(target=_finish, args=(self._run,), daemon=True)
            finish.start()
            finish.join(FINISH_SECONDS)
            self._run = None


def _start(directory: Path, mode: str, project: str, name: str, config: Mapping[str, Any]) -> Any:
    import wandb  # half a second, and only who wants it pays

    settings = wandb.Settings(console="off", init_timeout=INIT_SECONDS, login_timeout=1, silent=True)
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        name=name,
        mode=mode,  # type: ignore[arg-type]
        dir=str(directory),
        config=dict(config),
        settings=settings,
        id=_run_id(directory),
        resume="allow",
    )
    for clock in set(CLOCKS.values()):
        run.define_metric(clock)
    for names, clock in CLOCKS.items():
        run.define_metric(names, step_metric=clock)
    return run


def _artifact(run: Any, number: int, folder: Path, scores: Mapping[str, float]) -> Any:
    """Of the same name for all versions of a run."""
    import wandb

    artifact = wandb.Artifact(f"drafter-{run.id}", "drafter", metadata={"number": number, **scores})
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if run.offline:
            artifact.add_reference(path.as_uri(), path.name)
        else:
            artifact.add_file(str(path), skip_cache=True)
    return artifact


def _run_id(directory: Path) -> str:
    """Of the run whose figures are in `directory`; drawn when it is first asked for."""
    path = directory / RUN_ID
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        path.write_text(known := secrets.token_hex(8))
    return known


def _finish(run: Any) -> None:
    try:
        run.finish()
    except Exception as error:
        LOG.warning("W&B did not finish (%s); send the run with `wandb sync`", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
