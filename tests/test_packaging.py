"""What is in the wheel, what the command says, and that both get along with other packages."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import stepladder
from stepladder.launch.cli import COMMANDS
from tests.fresh import ROOT, SOURCES, FreshEnvironment, build_wheel, copy_of_checkout, pip

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = ("kernels", "parallel", "workers", "cluster", "launch")
GENERATE = """
import stepladder, stepladder.launch.where
from stepladder import LLM, SamplingParams
[got] = LLM("launch/demo_model", device="cpu").generate(["def main():"], SamplingParams(max_tokens=8, temperature=0.0))
print(stepladder.__file__, len(got.tokens), sep="\\n")
"""
BOTH = f"from kernels import get_kernel, kernelize\n{GENERATE}import kernels; print(kernels.__file__)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_of_checkout(folder / "checkout"), folder)


@pytest.fixture(scope="module")
def hugging_faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The wheel of the package `kernels`, which `transformers` recommends."""
    folder = tmp_path_factory.mktemp("kernels")
    try:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), "kernels")
    except subprocess.CalledProcessError:
        pytest.skip("no package index that has Hugging Face's `kernels`")
    [found] = folder.glob("kernels-*.whl")
    return str(found)


def python(code: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -c` with the code of this checkout, from any folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, env=env, capture_output=True, text=True)


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`stepladder ...`, as its console script runs it."""
    return python("from stepladder.launch.cli import main; main()", *words, cwd=cwd)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's folder, with folders named like ours."""
    folder = tmp_path / "project"
    for name in OURS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('this is another project')")
    return folder


def modules() -> list[Path]:
    """Of ours; the bundled models bring code for `transformers`, as their weights are data."""
    files = [file for name in SOURCES for file in (ROOT / name).rglob("*.py")]
    return [file for file in files if file.parent not in (ROOT / "launch" / "demo_model", ROOT / "launch" / "demo_moe")]


def test_every_package_is_listed() -> None:
    folders = [file.parent.relative_to(ROOT) for file in modules()]
    names = {".".join(folder.parts) for folder in folders}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(n if n == "stepladder" else f"stepladder.{n}" for n in names)
    assert set(PROJECT["tool"]["setuptools"]["package-dir"].values()) == set(SOURCES)


def test_every_module_lies_in_a_package_but_kernels() -> None:
    """With an `__init__` the folder would hide Hugging Face's `kernels` from whoever has a checkout on the path."""
    assert {file.parent.name for file in modules() if not (file.parent / "__init__.py").exists()} == {"kernels"}


def test_a_checkout_on_the_path_does_not_hide_the_package_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    code = "import sys; sys.path.append(sys.argv[1]); import kernels; from stepladder.kernels.rope import rotate\n"
    done = python(f"{code}print(kernels.theirs, rotate.__module__)", str(tmp_path))
    assert (done.stdout, done.stderr) == ("True stepladder.kernels.rope\n", "")


def test_the_wheel_holds_everything_and_one_name(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    kept = {name for name in names if not name.startswith(f"stepladder-{stepladder.__version__}.dist-info/")}
    sources = {file for name in SOURCES for file in (ROOT / name).rglob("*") if file.is_file()}
    sources = {file for file in sources if "__pycache__" not in file.parts}
    expected = {file.relative_to(ROOT).as_posix() for file in sources}
    assert kept == {name if name.startswith("stepladder/") else f"stepladder/{name}" for name in expected}
    assert {"stepladder/launch/conf/serve.yaml", "stepladder/launch/demo_model/model.safetensors"} <= kept


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == stepladder.__version__


def test_importing_it_alone_loads_no_torch() -> None:
    assert python("import sys, stepladder; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))").returncode == 0


def test_a_project_with_folders_of_the_same_names_is_in_nobodys_way(project: Path) -> None:
    """None of ours is looked for under its bare name."""
    done = python("import stepladder.launch.serve as s, stepladder.launch.train; print(s.__file__)", cwd=project)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ROOT}/launch/serve.py\n", "")


def test_the_command_says_what_it_can() -> None:
    for words in ((), ("--help",), ("-h",)):
        done = command(*words)
        assert (done.returncode, done.stderr) == (0, "") and all(f"  {name} " in done.stdout for name in COMMANDS)
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"{stepladder.__version__}\n")


def test_an_unknown_command_is_one_sentence() -> None:
    done = command("restart")
    listed = "serve, ctl, build, fetch, generate, train, chat, bench"
    sentence = f"stepladder: there is no command 'restart'; the commands are {listed}"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{sentence}\n")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_there(name: str, project: Path) -> None:
    done = command(name, "--help", cwd=project)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ours_first", [True, False], ids=["installed-first", "installed-last"])
def test_beside_hugging_faces_kernels(ours_first: bool, wheel: Path, hugging_faces: str, tmp_path: Path) -> None:
    packages = [str(wheel), hugging_faces] if ours_first else [hugging_faces, str(wheel)]
    fresh, empty = FreshEnvironment(tmp_path / "fresh", *packages), tmp_path / "empty"
    empty.mkdir()
    done = fresh.run("python", "-c", BOTH, cwd=empty)
    assert done.returncode == 0, done.stderr
    ours, tokens, theirs = done.stdout.splitlines()
    assert (Path(ours), tokens) == (fresh.packages / "stepladder" / "__init__.py", "8")
    assert Path(theirs) == fresh.packages / "kernels" / "__init__.py"
    assert not any((fresh.packages / name).exists() for name in OURS if name != "kernels")


@pytest.mark.slow
def test_the_installed_command_works_in_a_project_with_the_same_folders(
    wheel: Path, project: Path, tmp_path: Path
) -> None:
    fresh = FreshEnvironment(tmp_path / "fresh", str(wheel))
    (project / "prompts.txt").write_text("def main():\n")
    done = fresh.run("stepladder", "generate", "prompts=prompts.txt", "sampling.max_tokens=4", cwd=project)
    assert done.returncode == 0, done.stderr
    assert len((project / "prompts.txt.out.jsonl").read_text().splitlines()) == 1
