"""A journal belongs to one deployment, and outlives a full disk."""

import json
import logging
from pathlib import Path

import pytest

from stepladder.cluster.journal import Journal


def test_a_restarted_controller_reads_what_was_set(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.json"
    first = Journal(path, "a")
    first.set(port=8000, draining=True)
    again = Journal(path, "a")
    assert again.resumed and not first.resumed
    assert (again.get("port"), again.get("draining"), again.get("began")) == (8000, True, first.get("began"))


def test_another_deployment_of_the_folder_goes_on_with_the_lives_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    Journal(path, "a").set(port=8000, gateway_life=3, draining=True, served=True, **{"generation of engine-0": 7})
    other = Journal(path, "b")
    assert not other.resumed
    assert [other.get(key) for key in ("port", "draining", "served")] == [None] * 3
    assert (other.get("gateway_life"), other.get("generation of engine-0")) == (3, 7)
    assert not Journal(path, "a").resumed


def test_a_full_disk_is_told_once_and_gets_everything_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.json"
    journal = Journal(path, "a")
    path.with_suffix(".new").symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR):
        journal.set(port=8000)
        journal.set(gateway_life=2)
    assert journal.get("port") == 8000 and "port" not in json.loads(path.read_text())
    (told,) = caplog.messages
    assert told == f"{path} cannot be written (No space left on device); going on without"
    path.with_suffix(".new").unlink()
    journal.retry()
    assert (Journal(path, "a").get("port"), Journal(path, "a").get("gateway_life")) == (8000, 2)


def test_a_deployment_whose_folder_cannot_be_written_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: .*/file/journal\.json cannot be written: "):
        Journal(tmp_path / "file" / "journal.json", "a")
