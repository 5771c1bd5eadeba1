"""Hosts out of network namespaces, where this machine lets us make them."""

import pytest

from stepladder.launch.bench.rig import netns


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips whatever asks for it where hosts cannot be built, and says why."""
    if reason := netns.unavailable():
        pytest.skip(reason)
