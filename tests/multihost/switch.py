"""The switch between hosts, as its administrator has it: whom it leaves out, and what it has counted."""

import json
from typing import NamedTuple

from stepladder.launch.bench.rig.hosts import BRIDGE, DEVICE, Host
from stepladder.launch.bench.rig.netns import ip


class Traffic(NamedTuple):
    """Bytes that a host has sent over its link and received from it."""

    sent: int
    received: int


def cut_off(host: Host) -> None:
    """Take the host off the switch: it keeps its address and its link is up, but nothing comes or goes."""
    ip("-n", host.switch, "link", "set", host.name, "nomaster")


def join(host: Host) -> None:
    """Undo `cut_off`."""
    ip("-n", host.switch, "link", "set", host.name, "master", BRIDGE)


def traffic(host: Host) -> Traffic:
    """Since the host was built."""
    (device,) = json.loads(ip("-n", host.namespace, "-s", "-j", "link", "show", DEVICE))
    return Traffic(device["stats64"]["tx"]["bytes"], device["stats64"]["rx"]["bytes"])
