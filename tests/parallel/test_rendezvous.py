"""The ranks' store is reached at the address that it was told, and at no other of this machine."""

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from stepladder.parallel.rendezvous import open_store
from stepladder.parallel.shards import Shard
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.rank import RankConfig
from stepladder.workers.roles import ROLES, rank_of

OTHER = "127.0.0.2"  # this machine's, too


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((OTHER, port)) != 0


def test_a_store_listens_on_one_address() -> None:
    store = open_store("127.0.0.1")
    client = dist.TCPStore("127.0.0.1", store.port, None, False, timeout=timedelta(seconds=5))
    client.set("key", "value")
    assert store.get("key") == b"value" and refused(store.port)


def test_a_store_also_has_names_and_ipv6() -> None:
    for host in ("localhost", "::1"):
        assert dist.TCPStore(host, open_store(host).port, None, False, timeout=timedelta(seconds=5)).num_keys() >= 0


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OSError, match="address"):
        open_store("192.0.2.77")


@pytest.mark.parametrize("role", ROLES)
def test_every_kind_of_rank_listens_on_its_hosts_address_only(role: str) -> None:
    config = RankConfig(
        model="/nowhere", shard=Shard(0, 2), prefix="p", host="127.0.0.1", ranks_here=2, device="cpu", secret="s",
        collective_seconds=5.0, engine=EngineConfig(threads=1), kv=KvConfig(), role=role,
    )  # fmt: skip
    assert refused(rank_of(config).open_store())
