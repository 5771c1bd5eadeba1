"""Hosts on one machine: network namespaces on one switch, each with its own address and a link that can be shaped.

The switch is a namespace too, so the machine's own network is not touched: none of its devices, addresses, routes or
rules change, no packet leaves, and the addresses mean nothing outside. What hosts share is the machine: its
processes, files, memory, clock and host name. Needs Linux, root and iproute2; `netns.unavailable` says what is missing.

    with Hosts(2, Link(rate=400)) as hosts:
        server = hosts[0].popen([sys.executable, "-m", "http.server", "--bind", hosts[0].address, "8000"])
        hosts[1].run(["curl", f"http://{hosts[0].address}:8000/"])
        hosts[1].shape(Link(rate=100))
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from stepladder.launch.bench.rig import netns
from stepladder.launch.bench.rig.netns import ip, tc

MAX_HOSTS = 4
DEVICE = "eth0"  # a host's end of its link
BRIDGE = "bridge"
MTU = 9000  # jumbo frames: a shaped link handles every packet by itself, on a core that the ranks want


@dataclass(frozen=True, kw_only=True)
class Link:
    """Both directions of a host's link, each through a token bucket (tc-tbf(8)): a rate, not a delay.

    Attributes:
        rate: Mbit/s; None for as fast as the machine goes.
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate of a link is {self.rate}; it must be positive")

    @property
    def tbf(self) -> list[str]:
        """The arguments of the token bucket; it must have a rate.

        What passes in a quarter of a millisecond, 10 KiB at least, passes at once after a silence: with less, the
        kernel's timers make the link slower than told. What would have to wait for more than 100 ms is dropped.
        """
        assert self.rate is not None
        burst = max(10 << 10, int(self.rate * 1e6 / 8 * 250e-6))
        return ["tbf", "rate", f"{self.rate * 1e6:.0f}bit", "burst", f"{burst}b", "latency", "100ms"]


@dataclass(frozen=True, kw_only=True)
class Wire(Link):
    """What a bench is told about a link. late_ms: of latency, emulated. A rate or a latency, so that a case is either
    measured or emulated."""

    late_ms: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.late_ms < 0:
            raise ValueError(f"late_ms of a wire is {self.late_ms:g}; it must not be negative")
        if self.rate is not None and self.late_ms:
            both = f"rate {self.rate:g} and late_ms {self.late_ms:g}"
            raise ValueError(f"a wire has {both}; it can have one of them: make it two wires")


class Host:
    """One host.

    Attributes:
        name: h0, h1, ... address: on the switch, where the other hosts reach it; loopback is the host's own.
        namespace: as `ip netns` calls it. switch: its namespace, where the link's other end has the host's name.
        prefix: a command behind these words runs on the host.
    """

    def __init__(self, lan: str, number: int) -> None:
        self.name, self.address = f"h{number}", f"10.77.0.{number + 1}"
        self.namespace, self.switch = f"{lan}-{self.name}", f"{lan}-switch"
        self.prefix = ("ip", "netns", "exec", self.namespace)

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        """As `subprocess.run`, on this host."""
        return subprocess.run([*self.prefix, *command], **options)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """As `subprocess.Popen`, on this host; the process id is the command's own. It is killed when the host goes."""
        return subprocess.Popen([*self.prefix, *command], **options)

    def shape(self, link: Link) -> None:
        """Give the link another rate; what is queued at the old one is dropped."""
        for namespace, device in ((self.namespace, DEVICE), (self.switch, self.name)):
            shaped = json.loads(tc("-n", namespace, "-j", "qdisc", "show", "dev", device))[0]["kind"] == "tbf"
            if link.rate is not None:
                tc("-n", namespace, "qdisc", "replace", "dev", device, "root", *link.tbf)
            elif shaped:
                tc("-n", namespace, "qdisc", "del", "dev", device, "root")

    def build(self, link: Link) -> None:
        """On an existing switch."""
        ip("netns", "add", self.namespace)
        pair = f"{DEVICE} mtu {MTU} type veth peer name {self.name} mtu {MTU} netns {self.switch}"
        ip("-n", self.namespace, "link", "add", *pair.split())
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            ip("-n", self.namespace, "link", "set", device, "up")
        ip("-n", self.switch, "link", "set", self.name, "master", BRIDGE, "up")
        self.shape(link)


class Hosts:
    """Two to four hosts, as a context manager; in the end everything that runs on them is killed and they are gone.

    Should this process be killed before that, the next `Hosts` of anybody removes what it left.

    Raises:
        RuntimeError: a command of iproute2 failed; the message is what it said.
    """

    def __init__(self, count: int = 2, link: Link | None = None) -> None:
        if not 2 <= count <= MAX_HOSTS:
            raise ValueError(f"{count} hosts cannot be built; the number must be between 2 and {MAX_HOSTS}")
        lan = netns.new_name()
        self._link, self._switch = link or Link(), f"{lan}-switch"
        self._hosts = [Host(lan, number) for number in range(count)]

    def __enter__(self) -> Self:
        netns.sweep()
        with ExitStack() as stack:
            for namespace in self.namespaces:
                stack.callback(netns.remove, namespace)
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", BRIDGE, "up", "type", "bridge")
            for host in self._hosts:
                host.build(self._link)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def namespaces(self) -> list[str]:
        return [self._switch, *(host.namespace for host in self._hosts)]

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)
