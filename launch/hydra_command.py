"""How every command that takes Hydra's configuration runs: its help, its errors, one job or each of a sweep."""

import re
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from stepladder.launch.help import help_of
from stepladder.launch.where import CONF

SIGNALLED = 128  # exit codes above it are those of a signal, which is meant for a whole sweep
LONGEST = 200  # characters of a folder's name


def run_command(name: str, kind: Callable[[DictConfig], type], run: Callable[[DictConfig], int]) -> None:
    """Run the command whose configuration is conf/NAME.yaml, and exit; what `--help` asks for is printed instead.

    In a sweep (`--multirun`) a job that is refused does not end the others; the exit code is the worst of all.

    Args:
        kind: the dataclass of the command's options, of a configuration.
        run: returns the exit code; errors of the given kinds are one sentence and 1.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_of(name, kind, sys.argv[1:]))
        sys.exit(0)
    codes: list[int] = []

    @hydra.main(version_base=None, config_path=CONF, config_name=name)
    def job(config: DictConfig) -> None:
        try:
            code = run(config)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"stepladder: {error}", file=sys.stderr, flush=True)
            code = 1
        codes.append(code)
        if code > SIGNALLED:
            sys.exit(code)

    job()
    sys.exit(max(codes, default=0))


def of_this_job(path: str) -> str:
    """`path`, or in a sweep one of this job alone, below it or (a file with a suffix) beside it: no two jobs write to
    one place, and a job that is started again finds its own."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return path
    overrides, whole = HydraConfig.get().job.override_dirname or "job", Path(path)
    folder = re.sub(r"[^\w.,=+-]+", "_", overrides)[:LONGEST]
    if folder != overrides:  # others may have been cut to the same
        folder += f"-{blake2b(overrides.encode(), digest_size=4).hexdigest()}"
    return str(whole.with_name(f"{whole.stem}.{folder}{whole.suffix}") if whole.suffix else whole / folder)
