"""mypy over the package as a wheel has it: `python -m tests.typed`. It does not follow a package's `__path__`."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "parallel", "workers", "cluster", "launch")


def main() -> int:
    """mypy's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "stepladder"
        package.mkdir()
        for entry in [*(ROOT / name for name in FOLDERS), *(ROOT / "stepladder").iterdir()]:
            (package / entry.name).symlink_to(entry)
        command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "stepladder"]
        return subprocess.run([*command, "--cache-dir", ROOT / ".mypy_cache"], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
