"""Versions of a drafter on disk: whole or not there, numbered once, refused when they are not what they should be."""

import json
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.parallel.checkpoint import fingerprints
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.speculation.head.files import DataWindow, Head, Manifest, read_head
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.learning.versions import STALE_SECONDS, Versions
from tests.llama import write_llama

HIDDEN, INNER = 32, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), seed=5)


def head(model: Path, seed: int = 0, parent: int = 0) -> Head:
    torch.manual_seed(seed)
    net = RecurrentHead(HIDDEN, INNER)
    torch.nn.init.normal_(net.down.weight)
    window = DataWindow(requests=12, tokens=900, domains={"code": 600, "prose": 300})
    manifest = Manifest(HIDDEN, INNER, 99, fingerprints(model), {}, parent=parent, window=window)
    return Head(net, torch.arange(0, 64, 2), replace(manifest, scores={"overlap": 0.5 + seed / 100}))


def test_a_version_comes_back(model: Path, tmp_path: Path) -> None:
    versions = Versions(tmp_path / "deep" / "drafter", clock=lambda: 1234.5)
    assert versions.listed() == []
    first, second = head(model), head(model, seed=1, parent=1)
    assert [versions.publish(first), versions.publish(second)] == [1, 2]
    found = versions.read(2, model, ModelSpec.load(model))
    assert torch.equal(found.tokens, second.tokens)
    for name, tensor in second.net.state_dict().items():
        assert torch.equal(found.net.state_dict()[name], tensor)
    assert (found.manifest.version, found.manifest.parent, found.manifest.window) == (2, 1, second.manifest.window)
    one, two = Versions(tmp_path / "deep" / "drafter").listed()
    assert (one.number, one.parent, one.scores) == (1, 0, {"overlap": 0.5}) and two.parent == 1
    assert two.made == 1234.5 and two.window.domains == {"code": 600, "prose": 300}
    assert two.bytes == sum(path.stat().st_size for path in versions.folder(2).iterdir())
    assert read_head(versions.folder(2), model, ModelSpec.load(model)).manifest == found.manifest, "for speculate.model"


def test_weights_outlive_their_file(model: Path, tmp_path: Path) -> None:
    """Whoever has read a version does not read its file again: that may be removed, or written over."""
    versions = Versions(tmp_path)
    written = head(model)
    versions.publish(written)
    found = versions.read(1, model, ModelSpec.load(model))
    path = versions.folder(1) / "drafter.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(found.net.down.weight, written.net.down.weight)


def _change(home: Path, **fields: Any) -> None:
    path = home / "drafter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _flip(home: Path) -> None:
    path = home / "drafter.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _swap_for_first(home: Path) -> None:
    shutil.rmtree(home)
    shutil.copytree(home.parent / "1", home)


@pytest.mark.parametrize(
    ("spoil", "sentence", "listed"),
    [
        (_flip, "drafter.safetensors has another hash than drafter.json says; the file is damaged", True),
        (lambda home: os.truncate(home / "drafter.safetensors", 100), "another hash than", True),
        (lambda home: _change(home, sha256="0" * 64), "another hash than", True),
        (lambda home: _change(home, sha256=""), "its manifest has no hash of the weights", False),
        (lambda home: _change(home, target={"config.json": "0"}), "was made for another model than", True),
        (_swap_for_first, "its files are those of version 1", False),
        (lambda home: _change(home, version=3), "its files are those of version 3", False),
        (lambda home: _change(home, parent=2), "it was taught from version 2, which is no earlier one", False),
        (lambda home: _change(home, parent=-1), "parent is -1; it must be an integer from 0", False),
        (lambda home: _change(home, scores={"overlap": "good"}), "each value of it a number", False),
        (lambda home: _change(home, window={"requests": 1}), "it must be an object with requests and tokens", False),
        (lambda home: _change(home, hidden=1 << 40), "cannot be read as a drafter's head", True),
        (lambda home: (home / "drafter.json").unlink(), "there is no drafter.json in it", False),
        (lambda home: (home / "drafter.safetensors").unlink(), "there is no drafter.safetensors in it", False),
        (lambda home: shutil.rmtree(home), "is not there; there are 1, 3", False),
    ],
)
def test_a_version_that_is_not_what_it_should_be(
    model: Path, tmp_path: Path, spoil: Callable[[Path], Any], sentence: str, listed: bool
) -> None:
    versions = Versions(tmp_path)
    for seed in range(3):
        versions.publish(head(model, seed))
    spoil(versions.folder(2))
    with pytest.raises(ValueError, match=sentence) as error:
        versions.read(2, model, ModelSpec.load(model))
    said = str(error.value)
    assert said.startswith(f"version 2 of the drafter in {tmp_path}") and "\n" not in said
    assert [one.number for one in versions.listed()] == ([1, 2, 3] if listed else [1, 3])
    assert versions.read(1, model, ModelSpec.load(model)) and versions.publish(head(model)) == 4


def test_numbers_that_are_not_finite_are_neither_published_nor_read(model: Path, tmp_path: Path) -> None:
    versions, bad = Versions(tmp_path), head(model)
    bad.net.scale.data[3] = float("nan")
    scored = replace(head(model), manifest=replace(head(model).manifest, scores={"overlap": float("inf")}))
    for one in (bad, scored):
        with pytest.raises(ValueError, match="was not published: it holds numbers that are not finite"):
            versions.publish(one)
    assert versions.listed() == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecurrentHead, "is_finite", lambda self: True)
        versions.publish(bad)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        versions.read(1, model, ModelSpec.load(model))


def test_files_from_before_numbers_are_heads_still_but_no_versions(model: Path, tmp_path: Path) -> None:
    """As `launch.train recipe=head` wrote them."""
    versions = Versions(tmp_path)
    versions.publish(head(model))
    path = versions.folder(1) / "drafter.json"
    values = json.loads(path.read_text())
    old = {name: values[name] for name in ("hidden", "inner", "version", "target", "figures", "kind")}
    path.write_text(json.dumps(old))
    found = read_head(versions.folder(1), model, ModelSpec.load(model))
    assert found.manifest == Manifest(HIDDEN, INNER, 1, fingerprints(model), {})
    with pytest.raises(ValueError, match="no hash of the weights"):
        versions.read(1, model, ModelSpec.load(model))


@pytest.mark.parametrize("room", [0, 100, 30_000])
def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, room: int) -> None:
    """Files of more than so many bytes are refused; the weights have 22 KB, and what is written of them goes."""
    versions = Versions(tmp_path)
    versions.publish(head(model))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = Head(net := RecurrentHead(HIDDEN, 10 * INNER), torch.arange(9), head(model).manifest)
    assert net.hidden == HIDDEN
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        with pytest.raises(OSError, match=f"a version of the drafter was not published: {tmp_path} cannot be written"):
            versions.publish(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "given"]
    assert [one.number for one in versions.listed()] == [1]
    assert versions.publish(head(model)) == 3, "2 was given"


def test_a_folder_that_cannot_be_made_is_the_same_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"was not published: .*/file/below cannot be written: Not a directory"):
        Versions(tmp_path / "file" / "below").publish(head(model))


class Killed(BaseException):
    """As SIGKILL: nothing that catches errors sees it."""


def _dies_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Before its `step`-th operation on the disk."""
    count = iter(range(1000))

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if next(count) == step:
                raise Killed
            return real(*args, **named)

        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


def test_a_writer_that_dies_anywhere_leaves_nothing_half_published(model: Path, tmp_path: Path) -> None:
    """Numbers go on above the one it had, even if it is the highest and everything is pruned."""
    versions, highest, step = Versions(tmp_path, keep=1), 0, 0
    while True:
        there = [one.number for one in versions.listed()]
        with pytest.MonkeyPatch.context() as patch:
            _dies_at(step, patch)
            try:
                versions.publish(head(model))
                break
            except Killed:
                pass
        now = [one.number for one in versions.listed()]
        assert now in (there, [*there, max(now, default=0)])
        given = max([highest, *now])
        number = versions.publish(head(model))
        assert number > given
        assert versions.read(number, model, ModelSpec.load(model)).manifest.version == number
        highest, step = number, step + 1
        versions.prune(set())
        assert [one.number for one in versions.listed()] == [number]
    assert step > 8, "it died at every step"
    later = Versions(
        tmp_path, keep=1, clock=lambda: max(p.stat().st_mtime for p in tmp_path.iterdir()) + STALE_SECONDS + 1
    )
    assert list(tmp_path.glob("*.partial"))
    later.prune(set())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["given", str(later.listed()[0].number)])


def test_what_is_being_written_is_not_swept(model: Path, tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    versions.publish(head(model))
    (tmp_path / "2.partial").mkdir()
    (tmp_path / "1.gone").mkdir()
    versions.prune(set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.partial", "given"]


def test_prune_keeps_the_newest_and_the_named(model: Path, tmp_path: Path) -> None:
    versions = Versions(tmp_path, keep=2)
    for seed in range(6):
        versions.publish(head(model, seed))
    (tmp_path / "notes").mkdir()
    (tmp_path / "4" / "drafter.json").write_text("{}")  # is no version of ours
    versions.prune({2, 77})
    assert [one.number for one in versions.listed()] == [2, 5, 6]
    assert (tmp_path / "notes").is_dir() and (tmp_path / "4").is_dir()
    versions.prune(set())
    assert [one.number for one in versions.listed()] == [5, 6]
    for number in (6, 5):
        shutil.rmtree(versions.folder(number))
    assert versions.publish(head(model)) == 7, "numbers go on though no version is left"
    shutil.rmtree(tmp_path)
    assert versions.publish(head(model, parent=7)) == 8, "nor anything else that would say how far they were"


def _write(directory: Path, model: Path, seed: int, count: int, numbers: Any) -> None:
    torch.set_num_threads(1)
    versions, mine = Versions(directory, keep=1), head(model, seed)
    for _ in range(count):
        numbers.put((versions.publish(mine), seed))
        versions.prune(set())


def test_two_writers_never_get_one_number(model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    numbers: Any = context.Queue()
    writers = [context.Process(target=_write, args=(tmp_path, model, seed, 25, numbers)) for seed in range(3)]
    for writer in writers:
        writer.start()
    given = [numbers.get(timeout=60) for _ in range(75)]
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len({number for number, _ in given}) == 75
    for seed in range(3):
        own = [number for number, whose in given if whose == seed]
        assert own == sorted(own)
    last = max(given)
    found = Versions(tmp_path).read(last[0], model, ModelSpec.load(model))
    assert torch.equal(found.net.down.weight, head(model, last[1]).net.down.weight)
