"""`launch.ctl drafter`: its words, what a controller does at each, and what a person reads."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from stepladder.cluster.drafter_evidence import LEAST
from stepladder.cluster.drafter_orders import obey
from stepladder.cluster.drafter_registry import Registry, Told
from stepladder.launch import ctl
from stepladder.launch.ctl_drafter import DrafterOptions, in_short, told
from stepladder.workers.speculation.learning.versions import Versions
from tests.llama import write_llama
from tests.workers.speculation.learning.test_versions import head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), seed=5)


@pytest.fixture
def versions(model: Path, tmp_path: Path) -> Versions:
    """Three on the disk."""
    versions = Versions(tmp_path / "drafter", clock=lambda: 1.7e9)
    for seed in range(3):
        versions.publish(head(model, seed, parent=seed))
    return versions


@pytest.fixture
def registry() -> Registry:
    """Which knows of the three, and an engine that has the second."""
    registry = Registry()
    for number in (1, 2, 3):
        registry.published(number, {"overlap": 0.5 + number / 100}, 1.7e9)
        if number == 2:
            registry.observe("engine-0", Told(1, 2, LEAST, LEAST // 2), 1.7e9)
    return registry


def test_words_become_an_order() -> None:
    words = ["pin", "version=7", "name=a"]
    options = ctl.build(DrafterOptions, ctl.pairs(words, DrafterOptions.bare), strict=False)
    assert (options.order, options.version, options.name) == ("pin", 7, "a")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "drafter: there is no order; say drafter list, pin, rollback, pause, resume"),
        (["lst"], "drafter: 'lst' is no order; say drafter list"),
        (["pin"], "drafter: pin needs a version, and no other order takes one"),
        (["list", "version=7"], "drafter: pin needs a version, and no other order takes one"),
        (["pin", "7"], "drafter: '7' is not of the form option=value"),
        (["pin", "version=x"], "drafter: version is 'x'"),
        (["list", "format=xml"], "drafter: format is 'xml'; it must be table or json"),
    ],
)
def test_wrong_usage_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(["drafter", *words]) == ctl.USAGE
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_orders_do_what_they_say(registry: Registry, versions: Versions) -> None:
    def order(name: str, version: int | None = None) -> str:
        done = obey(registry, versions, name, version, 1.7e9)
        assert told(done) == done["said"]
        return told(done)

    assert registry.live == 3
    assert order("rollback") == "rolled back to 2: by order; 3 is rejected" and registry.live == 2
    with pytest.raises(ValueError, match="there is no earlier version"):
        order("rollback")
    with pytest.raises(ValueError, match=r"there is no version 9 of the drafter in .*/drafter; there are 1, 2, 3"):
        order("pin", 9)
    assert order("pin", 1).startswith("pinned 1 by order") and registry.live == 1
    assert order("pause").startswith("paused by order") and registry.paused
    assert order("resume") == "resumed by order; 2 is live" and not registry.paused


def test_a_list_for_a_person(registry: Registry, versions: Versions) -> None:
    registry.observe("engine-1", Told(1, 1), 1.7e9)
    registry.rollback(1.7e9)
    registry.pin(2, 1.7e9)
    lines = told(obey(registry, versions, "list", None, 1.7e9)).splitlines()
    assert lines[0].split() == ["version", "parent", "made", "requests", "tokens", "overlap", "acceptance", "MB"]
    shown = [line.split(None, 4) for line in lines[1:4]]
    assert [(one[0], one[1], one[4].split(None, 4)) for one in shown] == [
        ("1", "-", ["12", "900", "0.50", "-", "0.0"]),
        ("2", "1", ["12", "900", "0.51", "0.50", "0.0  live, pinned"]),
        ("3", "2", ["12", "900", "0.52", "-", "0.0  rejected: by order"]),
    ]
    assert lines[5] == "version 2 is live, acceptance 0.50, 2 is pinned, not yet taken by engine-1"
    assert lines[-1].endswith("pinned 2 by order; it stays live until learning is resumed")
    assert "published 3: overlap 0.53; it is live" in lines[-3]


def test_a_list_of_nothing(tmp_path: Path) -> None:
    registry = Registry()
    registry.pause(0.0)
    assert told(obey(registry, Versions(tmp_path), "list", None, 0.0)) == "no version yet; no version is live, paused"
    assert in_short(registry.report()) == "no version is live, paused"


def test_what_a_controller_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray wraps what a method raises in a traceback."""

    def refuse(cause: Exception) -> Any:
        def get(reference: object, timeout: float) -> Any:
            raise RayTaskError("drafter", "Traceback: ...", cause).as_instanceof_cause()

        monkeypatch.setattr(ray, "get", get)
        return ctl.answer(None, "a", DrafterOptions(order="list"))

    with pytest.raises(ValueError, match=r"^this deployment does not train a drafter; serve with train=online$"):
        refuse(ValueError("this deployment does not train a drafter; serve with train=online"))
    with pytest.raises(RayTaskError):
        refuse(KeyError("a fault of ours"))
