"""`docs/extending.md` and `docs/speculation.md` are true: their examples, done to a copy of the code, work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [(ROOT / "docs" / name).read_text() for name in ("extending.md", "speculation.md")]
FOLDERS = ("kernels", "parallel", "workers", "cluster", "launch", "stepladder")
SMALL = """SMALL = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    max_position=64,
)
"""
_STEP = re.compile(
    r"^(?:New file `(?P<new>[^`]+)`|In `(?P<file>[^`]+)`, (?P<how>after|before|in place of) `(?P<anchor>[^`]+)`"
    r"|It works):\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Step(NamedTuple):
    """file: None for the check at the end. anchor: how the line begins that the text goes after, before or in place of;
    None for a new file."""

    file: str | None
    how: str | None
    anchor: str | None
    text: str


class Example(NamedTuple):
    title: str
    most_files: int
    steps: list[Step]

    @property
    def files(self) -> set[str]:
        return {step.file for step in self.steps if step.file}

    @property
    def check(self) -> str:
        (check,) = (step.text for step in self.steps if step.file is None)
        return check


def examples() -> list[Example]:
    found = []
    parts = [
        part for page in PAGES for part in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    ]
    for title, rest in parts:
        steps = [Step(m["new"] or m["file"], m["how"], m["anchor"], m["text"]) for m in _STEP.finditer(rest)]
        if not steps:  # it explains something
            continue
        found.append(Example(title, sum(map(int, re.findall(r"\d+", title))) + title.count("and its yaml"), steps))
    return found


EXAMPLES = examples()


def apply(step: Step, root: Path) -> None:
    assert step.file
    path = root / step.file
    if step.anchor is None:
        assert not path.exists(), f"{step.file} is new"
        path.write_text(step.text)
        return
    lines = path.read_text().splitlines(keepends=True)
    at = [number for number, line in enumerate(lines) if line.startswith(step.anchor)]
    assert len(at) == 1, f"{len(at)} lines of {step.file} begin with {step.anchor!r}"
    lines[at[0] : at[0] + 1] = {
        "after": [lines[at[0]], step.text], "before": [step.text, lines[at[0]]], "in place of": [step.text]
    }[step.how or ""]  # fmt: skip
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all examples in it."""
    root = tmp_path_factory.mktemp("extended")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for example in EXAMPLES:
        for step in example.steps:
            if step.file:
                apply(step, root)
    return root


def test_there_is_an_example_of_everything() -> None:
    words = ("family", "module", "role", "layout", "sampling parameter", "figure", "suite", "drafter")
    assert [word for word, example in zip(words, EXAMPLES, strict=True) if word not in example.title] == []
    assert [example.most_files for example in EXAMPLES] == [1, 4, 4, 3, 3, 1, 2, 2]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_it_touches_no_more_files(example: Example) -> None:
    assert 0 < len(example.files) <= example.most_files


def test_they_work(extended: Path) -> None:
    """Each in its own function, one process for all; the examples are in the same copy, so they also get on."""
    program = "import stepladder\n" + SMALL
    for number, example in enumerate(EXAMPLES):
        body = "".join(f"    {line}\n" if line else "\n" for line in example.check.splitlines())
        program += f"def example_{number}():\n{body}\n"
    program += "print(stepladder.__file__)\n"
    for number, example in enumerate(EXAMPLES):
        program += f"example_{number}()\nprint({example.title!r})\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [str(extended / "stepladder" / "__init__.py"), *(e.title for e in EXAMPLES)]


def test_without_the_changes_they_do_not_work() -> None:
    """Each check fails on the code as it is, so that it shows something."""
    program = "import traceback\n" + SMALL
    for number, example in enumerate(EXAMPLES):
        body = "".join(f"    {line}\n" if line else "\n" for line in example.check.splitlines())
        program += f"def example_{number}():\n{body}\n"
        program += f"try:\n    example_{number}()\n    print({example.title!r})\nexcept Exception:\n    pass\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), "these pass without their changes"
