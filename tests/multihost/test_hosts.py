"""The hosts themselves: they reach each other, links are as fast as told, and nothing outlives its owner."""

import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from subprocess import PIPE

import psutil
import pytest

from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.hosts import Hosts, Link
from stepladder.launch.bench.rig.netns import ip
from tests.multihost.switch import cut_off, join, traffic
from tests.multihost.transfer import Connection

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(90)]

OWNER = """
import signal, sys
from stepladder.launch.bench.rig.hosts import Hosts

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
with Hosts(2) as hosts:
    print(*hosts.namespaces, hosts[0].popen(["sleep", "600"]).pid, flush=True)
    sys.stdin.read()
"""
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def hosts(possible: None) -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def connection(hosts: Hosts) -> Connection:
    return Connection(hosts[0], hosts[1])


def ours() -> set[str]:
    """Names of all namespaces of ours, whoever owns them."""
    return {path.name for path in netns.FOLDER.glob(f"{netns.PREFIX}-*")}


def machine() -> list[str]:
    """Names of devices, addresses and routes of the machine itself."""
    return [ip("-o", *words) for words in (("-br", "link"), ("-br", "address"), ("route",))]


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen, list[str], int]]:
    """Another process that has hosts; the process, their namespaces, and the id of one that runs on the first."""
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout
        *namespaces, pid = process.stdout.readline().split()
        try:
            yield process, namespaces, int(pid)
        finally:
            process.send_signal(signal.SIGINT)


def runs(pid: int) -> bool:
    """Whether there is such a process, and not just one that nobody has asked for its exit code."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_bytes_go_where_they_are_sent_and_are_counted(hosts: Hosts, connection: Connection) -> None:
    before = [traffic(host) for host in hosts]
    connection.transfer(MEGABYTE)
    after = [traffic(host) for host in hosts]
    gone = [(a.sent - b.sent, a.received - b.received) for a, b in zip(after, before, strict=True)]
    assert gone[0][0] >= MEGABYTE <= gone[1][1]
    assert max(gone[0][1], gone[1][0], *gone[2]) < MEGABYTE / 10


def test_hosts_know_no_way_out(hosts: Hosts) -> None:
    """Every host has one route, to the others; the switch has no address and no way to the machine's own network."""
    for host in hosts:
        routes = json.loads(ip("-n", host.namespace, "-j", "route"))
        assert [(r["dst"], r["dev"], r.get("gateway")) for r in routes] == [("10.77.0.0/24", "eth0", None)]
    switch = hosts.namespaces[0]
    assert ip("-n", switch, "route") == ""
    devices = json.loads(ip("-n", switch, "-j", "link"))
    assert {d["ifname"] for d in devices} == {"lo", "bridge", *(host.name for host in hosts)}


def test_a_link_is_as_slow_as_told_and_no_slower(hosts: Hosts, connection: Connection) -> None:
    """Either end's link counts; the rest of a packet is what a transfer takes longer than its bytes."""
    size, rate = 4 * MEGABYTE, 100.0
    unshaped = connection.transfer(size)
    for end in (hosts[0], hosts[1]):
        end.shape(Link(rate=rate))
        shaped = connection.transfer(size)
        end.shape(Link())
        assert size * 8 / (rate * 1e6) <= shaped < 2 * size * 8 / (rate * 1e6), f"{end.name}: {shaped:.3f} s"
        assert unshaped < shaped / 3
    assert connection.transfer(size) < shaped / 3


def test_a_host_that_is_cut_off_hears_nothing_until_it_joins_again(hosts: Hosts, connection: Connection) -> None:
    """Nothing of an established connection is lost, and the others do not notice."""
    other = Connection(hosts[0], hosts[2])
    cut_off(hosts[1])
    try:
        connection.begin(1000)
        assert other.transfer(1000) < 0.5
        with pytest.raises(Empty):
            connection.seconds(timeout=0.7)
    finally:
        join(hosts[1])
    assert connection.seconds(timeout=10) > 0.7
    assert connection.transfer(1000) < 0.5


def test_everything_is_gone_after_an_exception(possible: None) -> None:
    before = machine()
    with pytest.raises(ZeroDivisionError), Hosts(4) as hosts:
        assert set(hosts.namespaces) <= ours() and machine() == before
        process = hosts[3].popen(["sleep", "600"])
        _ = 1 / 0
    assert not ours() & set(hosts.namespaces)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert machine() == before


def test_everything_is_gone_after_ctrl_c(possible: None) -> None:
    with owner() as (process, namespaces, pid):
        assert set(namespaces) <= ours() and runs(pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert "KeyboardInterrupt" in errors
    assert not ours() & set(namespaces) and not runs(pid)


def test_what_a_killed_owner_left_goes_with_the_next_run_and_nothing_else(possible: None) -> None:
    bystanders = [f"someone-{secrets.token_hex(3)}", f"{netns.PREFIX}-{secrets.token_hex(3)}"]
    with owner() as (alive, kept, kept_pid), owner() as (dead, left, left_pid):
        try:
            for name in bystanders:
                ip("netns", "add", name)
            assert {*kept, *left} <= ours()
            dead.kill()
            dead.wait()
            assert runs(left_pid)
            with Hosts(2):
                assert not ours() & set(left) and not runs(left_pid)
            assert alive.poll() is None and set(kept) <= ours() and runs(kept_pid)
            assert all((netns.FOLDER / name).exists() for name in bystanders)
        finally:
            for name in bystanders:
                ip("netns", "del", name)


@pytest.mark.parametrize(("count", "rate"), [(1, None), (5, None), (2, 0.0), (2, -1.0)])
def test_what_cannot_be_is_refused(count: int, rate: float | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        Hosts(count, Link(rate=rate))


def test_without_the_right_to_make_them_tests_skip_with_one_sentence(possible: None) -> None:
    powerless = ["setpriv", "--bounding-set=-sys_admin,-net_admin", "--inh-caps=-all"]
    here = ["tests/multihost/test_hosts.py", "-k", "counted", "--confcutdir=tests/multihost", "-p", "no:cacheprovider"]
    done = subprocess.run([*powerless, sys.executable, "-m", "pytest", "-q", *here], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert "no network namespaces can be made here" in line and "Operation not permitted" in line


def test_without_iproute2_tests_skip_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert netns.unavailable() == "ip and tc of iproute2 cannot be found; install it"
