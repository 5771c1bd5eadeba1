"""A wheel of this checkout, and fresh virtual environments to install it into."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("stepladder", "kernels", "parallel", "workers", "cluster", "launch")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def copy_of_checkout(folder: Path) -> Path:
    """What a wheel is made of, elsewhere: setuptools leaves files behind where it builds, and packs those it finds."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(checkout: Path, into: Path) -> Path:
    """Needs no network: setuptools is in the `test` extra."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(into), str(checkout))
    [wheel] = into.glob("stepladder-*.whl")
    return wheel


def pip(*words: str) -> None:
    """Raises CalledProcessError; what pip said is on stderr."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words], check=True)


class FreshEnvironment:
    """A virtual environment of its own packages, in front of all that the running one has.

    The running one's folder is only put on `sys.path`: its .pth files are not read, so an editable Stepladder there is
    not found.
    """

    def __init__(self, folder: Path, *packages: str) -> None:
        """packages: installed in this order, without what they depend on."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        for package in packages:
            pip("--python", str(self.python), "install", "--no-deps", package)
        for shared in {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}:
            (self.packages / f"{Path(shared).parent.parent.name}-shared.pth").write_text(f"{shared}\n")
        self._write_ray()

    @property
    def packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def run(self, *command: str | Path, cwd: Path, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """A command of this environment, such as `python`, from a folder."""
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env["PATH"] = f"{self.folder / 'bin'}:{env['PATH']}"
        words = [self.folder / "bin" / command[0], *command[1:]]
        return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds)

    def _write_ray(self) -> None:
        """The command that pip would have written, had Ray been installed here."""
        script = self.folder / "bin" / "ray"
        script.write_text(f"#!{self.python}\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n")
        script.chmod(0o755)
