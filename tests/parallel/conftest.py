"""One checkpoint per family, written once."""

from pathlib import Path

import pytest

from tests.families import FAMILIES, write_family


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}
