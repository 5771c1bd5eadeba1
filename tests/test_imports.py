"""Who may import whom, read from the sources (imports inside functions included)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "parallel", "workers", "cluster", "launch")  # each may import those before it, and itself
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
ALLOWED = {  # top-level package -> where it may be imported
    "ray": ("cluster/", "launch/", "workers/actors.py"),
    "hydra": ("launch/",),
    "omegaconf": ("launch/",),
    "wandb": ("cluster/monitor.py",),
    "deepspeed": ("workers/trainer.py",),
}
HOST_ONLY = ("workers/core.py", "workers/scheduler.py", "workers/blocks.py", "workers/codec.py")


def imports(source: str, package: str = "") -> Iterator[str]:
    """Every module that is imported anywhere in `source`, a module of the package `package`, by its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import(node.func) and node.args:
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), f"line {node.lineno}: this import cannot be checked"
            yield str(argument.value)


def _is_import(function: ast.expr) -> bool:
    """`__import__(...)`, `import_module(...)`, `importlib.import_module(...)`."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("__import__", "import_module")


def violations(path: str, source: str) -> list[str]:
    layer = path.split("/")[0]
    above = LAYERS[LAYERS.index(layer) + 1 :] if layer in LAYERS else ()
    found = []
    for module in imports(source, path.removesuffix(".py").rpartition("/")[0].replace("/", ".")):
        top = module.split(".")[0]
        if top in above or (top == "stepladder" and layer in LAYERS[:-1]):
            found.append(f"{path} imports {module}: {layer} lies below {top}")
        if top in ALLOWED and not path.startswith(ALLOWED[top]):
            found.append(f"{path} imports {module}: only {', '.join(ALLOWED[top])} may")
        if path in HOST_ONLY and top in ("torch", "numpy", "zmq", "parallel", "kernels"):
            found.append(f"{path} imports {module}: it is pure host code")
    return found


@pytest.mark.parametrize("file", [*FILES, ROOT / "stepladder.py"], ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text()) == []


def test_there_is_something_to_check() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(LAYERS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("parallel/x.py", "import workers.core"),
        ("parallel/x.py", "def f():\n    from workers import core"),
        ("kernels/x.py", "from parallel.mesh import Mesh"),
        ("kernels/x.py", "from importlib import import_module\nimport_module('parallel.mesh')"),
        ("workers/x.py", "if True:\n    import stepladder"),
        ("workers/x.py", "from ..cluster import api"),
        ("workers/engine.py", "import ray"),
        ("workers/actors.py", "import wandb"),
        ("cluster/api.py", "class A:\n    def f(self):\n        import omegaconf.dictconfig"),
        ("cluster/api.py", "from hydra.core import utils"),
        ("launch/train.py", "import deepspeed.ops"),
        ("stepladder.py", "__import__('ray')"),
        ("workers/scheduler.py", "import torch"),
    ],
)
def test_the_check_finds_what_it_must(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("workers/actors.py", "import ray"),
        ("cluster/monitor.py", "import wandb"),
        ("launch/conf/x.py", "import hydra, ray"),
        ("workers/trainer.py", "def f():\n    import deepspeed"),
        ("workers/engine.py", "from parallel.mesh import Mesh\nfrom workers.core import Request\nimport rayleigh"),
        ("workers/x.py", "from . import core\nfrom .core import Request"),
    ],
)
def test_the_check_lets_the_rest_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
