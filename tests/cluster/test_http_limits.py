"""What one HTTP client may take of the server, over real sockets."""

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import httpx
import pytest

from stepladder.cluster.gateway.http_limits import open_files
from tests.cluster.serving import Server, eventually, serve

pytestmark = pytest.mark.timeout(60)
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@contextmanager
def connected(server: Server, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    url = httpx.URL(server.url)
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect((url.host, url.port))
        yield client


def everything(client: socket.socket) -> bytes:
    """What is sent until the server closes."""
    found = b""
    try:
        while chunk := client.recv(1 << 16):
            found += chunk
    except ConnectionError:
        pass
    return found


def send_all(client: socket.socket, data: bytes) -> None:
    """As much as the server takes."""
    with suppress(OSError):
        client.sendall(data)


def refused(client: socket.socket, status: int, code: str) -> None:
    head, _, body = everything(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b"connection: close" in head and json.loads(body)["error"]["code"] == code


@pytest.fixture(scope="module")
def server(random_model: Path) -> Iterator[Server]:
    with serve(random_model, header_seconds=2.0, body_seconds=2.0) as one:
        yield one


@pytest.mark.parametrize("where", ["value", "name", "path", "many"])
def test_headers_without_end(server: Server, where: str) -> None:
    begin = {
        "value": b"GET / HTTP/1.1\r\nX: ",
        "name": b"GET / HTTP/1.1\r\n",
        "path": b"GET /",
        "many": b"GET / HTTP/1.1\r\n",
    }
    with connected(server) as client:
        send_all(client, begin[where] + (b"A: b\r\n" * 15_000 if where == "many" else b"a" * (80 << 10)))
        refused(client, 431, "headers_too_large")


def test_large_headers_that_end_are_taken(server: Server) -> None:
    assert httpx.get(server.url + "/health", headers={"X-Large": "a" * (50 << 10)}).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\nX"], ids=["nothing", "half a header"])
def test_headers_that_do_not_come(server: Server, sent: bytes) -> None:
    with connected(server) as client:
        client.sendall(sent)
        refused(client, 408, "request_timeout")


def test_a_second_request_must_come_to_its_end_too(server: Server) -> None:
    with connected(server) as client:
        client.sendall(GET)
        answer = b""
        while not answer.endswith(b'{"status":"alive"}'):
            answer += client.recv(1 << 16)
        client.sendall(b"GET /hea")
        refused(client, 408, "request_timeout")


@pytest.mark.parametrize("how", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_bodies_that_stop(server: Server, how: bytes) -> None:
    """The application waits for the body, so that nobody has answered yet: the connection is closed."""
    with connected(server) as client:
        client.sendall(POST + how)
        began = monotonic()
        everything(client)
        assert 1.5 < monotonic() - began < 15
    eventually(lambda: not server.service.in_flight)


def test_trailers_without_end(random_model: Path) -> None:
    with serve(random_model, body_bytes=100_000) as server, connected(server) as client:
        send_all(client, POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 100_000)
        everything(client)


def test_requests_in_a_pipeline(server: Server) -> None:
    with connected(server) as client:
        client.sendall(GET * 8)
        answer = b""
        while answer.count(b'{"status":"alive"}') < 8:
            answer += client.recv(1 << 16)
    with connected(server) as client:
        send_all(client, GET * 100_000)
        assert everything(client).count(b'{"status":"alive"}') < 100_000
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_client_that_does_not_read(random_model: Path) -> None:
    """Its stream is cut, and the engine stops working for it."""
    body = json.dumps(
        {"model": "org/tiny", "prompt": "a", "n": 64, "max_tokens": 1000, "stream": True, "ignore_eos": True}
    ).encode()
    with serve(random_model, write_seconds=0.5) as server, connected(server, receive_buffer=4096) as client:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: server.running > 0)
        eventually(lambda: server.running == 0, seconds=30)
        assert server.backend.engine.stats.generation_tokens < 64_000


def test_as_many_connections_as_the_server_takes(random_model: Path) -> None:
    with serve(random_model, connections=3) as server:
        with connected(server) as one, connected(server), connected(server):
            one.sendall(GET)
            assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
            with connected(server) as fourth:
                refused(fourth, 503, "service_unavailable")
        eventually(lambda: _answers(server))


def _answers(server: Server) -> bool:
    return httpx.get(server.url + "/health").status_code == 200


def test_nonsense_is_refused_in_openais_shape(server: Server) -> None:
    with connected(server) as client:
        client.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        head, _, body = everything(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["type"] == "invalid_request_error"


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes() -> None:
    most = open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= most > 256
