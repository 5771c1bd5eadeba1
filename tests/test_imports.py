"""Who may import whom, read from the sources (imports inside functions included)."""

import ast
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "parallel", "workers", "cluster", "launch")  # each may import those before it, and itself
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
PUBLIC = sorted((ROOT / "stepladder").glob("*.py"))
SHARED_WITH_GATEWAYS = ("config", "endpoint", "names", "processes")  # all of cluster/ that cluster/gateway/ may import
ALLOWED = {  # top-level package -> where it may be imported
    "ray": ("cluster/", "launch/", "workers/actors.py"),
    "hydra": ("launch/",),
    "omegaconf": ("launch/",),
    "gguf": ("parallel/gguf/",),
    "wandb": ("cluster/monitor.py",),
    "deepspeed": tuple(f"workers/training/{name}.py" for name in ("ranks", "sharded", "trainer")),
    "transformers": (
        *("parallel/modeling_stepladder.py", "launch/demo_model/", "launch/demo_moe/"),
        *("launch/bench/engine/", "launch/bench/moe.py"),  # they compare with it
    ),
}
_DRAFTERS = ("calibration", "lookup", "ngram", "occurrences", "recycling", "suffix")
HOST_ONLY = (
    *("kernels/host_noise.py", "workers/core.py", "workers/scheduler.py", "workers/blocks.py", "workers/codec.py"),
    *(f"workers/speculation/{name}.py" for name in ("drafter", "price")),
    *(f"workers/speculation/drafters/{name}.py" for name in _DRAFTERS),
)


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
    layer, package = path.split("/")[0], path.removesuffix(".py").rpartition("/")[0].replace("/", ".")
    above = LAYERS[LAYERS.index(layer) + 1 :] if layer in LAYERS else ()
    found = []
    for full in imports(source, f"stepladder.{package}"):
        top, _, rest = full.partition(".")
        if top in LAYERS:
            found.append(f"{path} imports {full}: it is stepladder.{full}, or another project's {top}")
        if top == "stepladder":
            found += [f"{path} imports {full}: {why}" for why in _against_the_house(path, layer, above, rest)]
        if top in ALLOWED and not path.startswith(ALLOWED[top]):
            found.append(f"{path} imports {full}: only {', '.join(ALLOWED[top])} may")
        ours = rest.split(".")[0] in ("parallel", "kernels") and not any(_file(rest) == each for each in HOST_ONLY)
        if path in HOST_ONLY and (top in ("torch", "numpy", "zmq") or ours):
            found.append(f"{path} imports {full}: it is pure host code")
    return found


def _file(module: str) -> str:
    """Of a module, or of what is imported from one."""
    names = module.split(".")
    return next(
        (f"{'/'.join(part)}.py" for part in (names, names[:-1]) if (ROOT / f"{'/'.join(part)}.py").is_file()), ""
    )


def _against_the_house(path: str, layer: str, above: tuple[str, ...], module: str) -> Iterator[str]:
    """Why `path` may not import `module` of ours."""
    top, _, rest = module.partition(".")
    if top in above or (top not in LAYERS and layer in LAYERS[:-1] and module != "__version__"):
        yield f"{layer} lies below {top or 'the public face'}"
    if top == "cluster" and layer == "cluster":
        within, of_gateway = path.startswith("cluster/gateway/"), rest.split(".")[0] == "gateway"
        if of_gateway and not within:
            yield "the control plane does not know the gateway's program"
        if within and not of_gateway and rest.split(".")[0] not in SHARED_WITH_GATEWAYS:
            yield f"gateways share only {', '.join(SHARED_WITH_GATEWAYS)} with the control plane"


def graph(of: Callable[[str], str]) -> dict[str, set[str]]:
    """Which of our modules import which, imports for types only left out; `of` maps a module to what it counts as."""
    names = {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in FILES}
    arrows: dict[str, set[str]] = {}
    for file in FILES:
        name = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        source = ast.unparse(ast.parse(file.read_text().replace("if TYPE_CHECKING:", "if False:")))
        source = "\n".join(_at_run_time(ast.parse(source)))
        for full in imports(source, f"stepladder.{name.rpartition('.')[0]}"):
            target = full.removeprefix("stepladder.")
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and full.startswith("stepladder.") and of(target) != of(name):
                arrows.setdefault(of(name), set()).add(of(target))
    return arrows


def _at_run_time(tree: ast.Module) -> Iterator[str]:
    """The statements of a module that are run when it is imported; the bodies of functions may import back."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and node.test.value is False:
            node.body = [ast.Pass()]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return (ast.unparse(node) for node in tree.body)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some circle of arrows; empty if there is none."""
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def room(module: str) -> str:
    """The folder inside a layer that a module lies in; what lies directly in the layer stays by itself."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else module


def test_no_module_imports_itself_in_a_circle() -> None:
    assert circle(graph(lambda module: module)) == []


def test_no_circle_among_the_rooms() -> None:
    """Each folder inside a layer taken as one, beside the files that lie in the layer itself."""
    assert circle(graph(room)) == []
    assert circle({"a": {"b"}, "b": {"a"}}), "a circle is found"


@pytest.mark.parametrize("file", [*FILES, *PUBLIC], ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text()) == []


def test_there_is_something_to_check() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(LAYERS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("parallel/x.py", "import stepladder.workers.core"),
        ("parallel/x.py", "def f():\n    from stepladder.workers import core"),
        ("parallel/x.py", "from workers import core"),
        ("kernels/x.py", "from stepladder.parallel.mesh import Mesh"),
        ("kernels/x.py", "from importlib import import_module\nimport_module('stepladder.parallel.mesh')"),
        ("launch/x.py", "import kernels"),
        ("workers/x.py", "if True:\n    import stepladder"),
        ("workers/x.py", "from ..cluster import api"),
        ("workers/afd/x.py", "from ...cluster import api"),
        ("workers/engine.py", "import ray"),
        ("workers/actors.py", "import wandb"),
        ("cluster/keeper.py", "from stepladder.cluster.gateway.actor import GatewayActor"),
        ("cluster/gateway/actor.py", "from stepladder.cluster.gang import Gang"),
        ("cluster/gateway/api.py", "class A:\n    def f(self):\n        import omegaconf.dictconfig"),
        ("cluster/gateway/api.py", "from hydra.core import utils"),
        ("launch/train.py", "import deepspeed.ops"),
        ("stepladder/llm.py", "__import__('ray')"),
        ("workers/scheduler.py", "import torch"),
        ("workers/scheduler.py", "from stepladder.parallel.mesh import Mesh"),
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
        ("launch/x.py", "import stepladder"),
        ("workers/training/trainer.py", "def f():\n    import deepspeed"),
        (
            "workers/engine.py",
            "from stepladder.parallel.mesh import Mesh\nfrom stepladder.workers.core import Request\nimport rayleigh",
        ),
        ("workers/x.py", "from . import core\nfrom .core import Request"),
        ("cluster/gateway/x.py", "from stepladder.cluster.endpoint import Endpoint"),
        ("cluster/gateway/x.py", "from stepladder import __version__"),
    ],
)
def test_the_check_lets_the_rest_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
