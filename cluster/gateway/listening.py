"""The socket that an HTTP server is given."""

import socket


def listen(host: str, port: int = 0) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one.

    The protocol is named because asyncio turns Nagle's algorithm off only where it is. With it on, the second small
    packet of an answer waits for the client's delayed acknowledgement: 40 ms per answer, or per token of a stream.

    Raises:
        ValueError: this address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ValueError(
            f"gateway.host {host} port {port}: {error.strerror}; gateway.port=0 takes a free one"
        ) from None
    return listening
