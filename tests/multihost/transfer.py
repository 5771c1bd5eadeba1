"""Two processes and a connection between them; the sender is told over stdin how many bytes to send.

python -m tests.multihost.transfer receive ADDRESS        prints the port it listens on
python -m tests.multihost.transfer send ADDRESS PORT      prints, per line of stdin, the seconds until all had arrived
"""

import socket
import sys
from queue import Queue
from subprocess import PIPE, Popen
from threading import Thread
from time import perf_counter

from stepladder.launch.bench.rig.hosts import Host

COMMAND = [sys.executable, "-m", "tests.multihost.transfer"]


class Connection:
    """From one host to another, for as long as both live. It is in the hosts' hands to end its processes."""

    def __init__(self, sender: Host, receiver: Host) -> None:
        self._receiver = receiver.popen([*COMMAND, "receive", receiver.address], stdout=PIPE, text=True)
        port = _line(self._receiver)
        command = [*COMMAND, "send", receiver.address, port]
        self._sender = sender.popen(command, stdin=PIPE, stdout=PIPE, text=True)
        self._seconds: Queue[float] = Queue()
        Thread(target=self._read, daemon=True).start()

    def begin(self, num_bytes: int) -> None:
        assert self._sender.stdin
        print(num_bytes, file=self._sender.stdin, flush=True)

    def seconds(self, timeout: float) -> float:
        """How long it took; queue.Empty if it has not arrived within `timeout` seconds."""
        return self._seconds.get(timeout=timeout)

    def transfer(self, num_bytes: int) -> float:
        self.begin(num_bytes)
        return self.seconds(timeout=30)

    def _read(self) -> None:
        assert self._sender.stdout
        for line in self._sender.stdout:
            self._seconds.put(float(line))


def _line(process: Popen) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def receive(address: str) -> None:
    listening = socket.create_server((address, 0))
    print(listening.getsockname()[1], flush=True)
    connection, _ = listening.accept()
    with connection, connection.makefile("rwb") as stream:
        while size := stream.read(8):
            left = int.from_bytes(size, "big")
            while left:
                left -= len(stream.read(min(left, 1 << 20)))
            stream.write(b"!")
            stream.flush()


def send(address: str, port: str) -> None:
    with socket.create_connection((address, int(port)), timeout=60) as connection:
        for line in sys.stdin:
            begun = perf_counter()
            connection.sendall(int(line).to_bytes(8, "big") + bytes(int(line)))
            assert connection.recv(1) == b"!"
            print(perf_counter() - begun, flush=True)


if __name__ == "__main__":
    role, *where = sys.argv[1:]
    receive(*where) if role == "receive" else send(*where)
