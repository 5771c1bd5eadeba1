"""Run one suite: `python -m launch.bench suite=serve [key=value]`. Its options are in launch/conf/suite/.

The result goes to run_dir as JSON and, where matplotlib is installed, as a picture; the summary is printed last. The
exit code is 0 whether the goals hold or not, and 143 after SIGTERM.
"""

import logging
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from stepladder.launch.hydra_command import of_this_job, run_command
from stepladder.launch.report import Report, publish
from stepladder.launch.typed_config import build, plain
from stepladder.launch.where import CONF, FOLDER

SUITES = sorted(path.stem for path in Path(CONF, "suite").glob("*.yaml"))

TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    run_command("bench", lambda config: _suite(config.name)[0], _bench)


def _bench(config: DictConfig) -> int:
    logging.getLogger().setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _end)
    options, run = suite_of(config)
    publish(run(options), sys.argv[1:], Path(options.run_dir))
    return 0


def _end(*_: object) -> None:
    """End as after an error, so that folders, namespaces and private Rays go too; by default SIGTERM ends at once.

    `timeout` sends it twice, to the process and to its group; the second must not break off that teardown.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.exit(TERMINATED)


def suite_of(config: DictConfig) -> tuple[Any, Callable[[Any], Report]]:
    """The suite's options, resolved and checked, and the function that runs it.

    Raises:
        ValueError: an option that does not exist or cannot be.
    """
    values = plain(config)
    name = values.get("name")
    if name not in SUITES:
        raise ValueError(f"name is {name!r}; the suites are {', '.join(SUITES)}")
    kind, run = _suite(name)
    return build(kind, values | {"run_dir": of_this_job(str(Path(values["run_dir"]).absolute()))}), run


def _suite(name: str) -> tuple[type, Callable[[Any], Report]]:
    """The dataclass of its options, and the function that runs it."""
    home = f"{name}.suite" if (FOLDER / "bench" / name).is_dir() else name
    return cast(tuple[type, Callable[[Any], Report]], pkgutil.resolve_name(f"stepladder.launch.bench.{home}:SUITE"))


if __name__ == "__main__":
    main()
