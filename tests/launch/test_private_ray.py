"""A private Ray gets the ports that it was told."""

import socket

import pytest

from stepladder.launch.private_ray import PrivateRay, reserved_port
from tests.cluster.jobs import eventually


def test_a_reserved_port_is_only_for_servers_that_share() -> None:
    with reserved_port() as held, socket.socket() as other, socket.socket() as sharing:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sharing.bind(("127.0.0.1", port))
        sharing.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.ray
def test_the_client_port_is_kept_until_ray_takes_it() -> None:
    """Its server comes up a little later than the rest."""
    with PrivateRay(num_cpus=1) as ray:
        port = ray._client_port.getsockname()[1]

        def listening() -> set[int]:
            return {c.laddr.port for p in ray._processes() for c in p.net_connections() if c.status == "LISTEN"}

        eventually(lambda: port in listening(), listening)
        assert ray.runs


def test_it_is_given_back() -> None:
    ray = PrivateRay(num_cpus=1)
    port = ray._client_port.getsockname()[1]
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("", port))
    ray._client_port.close()
    with socket.socket() as other:
        other.bind(("", port))
