"""Where ranks meet before they are a group: a store that listens on one address of this machine, and no other."""

import socket

import torch.distributed as dist


def open_store(host: str) -> dist.TCPStore:
    """A store on a free port of `host`, an address of this machine; others reach it there.

    A `TCPStore` left to itself listens on every address. It knows no authentication, so it must not be reached from
    networks that the ranks do not use.

    Raises:
        OSError: `host` is not an address of this machine.
    """
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    return dist.TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=listening.detach())
