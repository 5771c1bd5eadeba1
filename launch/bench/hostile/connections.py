"""What a client can do to a server with its connection rather than with its request.

Each attack is a coroutine that opens connections of its own and returns what it was answered; it ends by itself, once
the server has closed or after about `LONGEST` seconds.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from random import Random
from typing import Any

from stepladder.launch.bench.hostile.fuzz import Target
from stepladder.launch.bench.hostile.line import Door, Line

LONGEST = 25.0  # longer than the server waits for headers
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
JSON = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
NONSENSE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"GET /\r\n\r\n", b"\x00" * 5000, b"\r\n" * 5000,
    b"GET /health HTTP/9.9\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n", b"GET  /health  HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\nHost: a\n\n", b"G\xc3\x89T / HTTP/1.1\r\n\r\n", b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost : a\r\n b\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\xff\x00\x00\x00\x00\x00\x01\x7f",
)  # fmt: skip
LYING_LENGTHS = (
    b"Content-Length: -1", b"Content-Length: 5, 5", b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: 2",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Content-Length: +5", b"Content-Length: 0x5",
    b"Content-Length: " + b"9" * 30, b"Content-Length: " + b"9" * 9000, b"Content-Length: \xb2", b"Content-Length:",
    b"Content-Length: 18446744073709551616", b"Transfer-Encoding: chunked, gzip", b"Transfer-Encoding: nonsense",
)  # fmt: skip

Attack = Callable[[Door, Random, Target], Coroutine[Any, Any, bytes]]


def completion(target: Target, **fields: Any) -> bytes:
    """A valid request, whole."""
    body = json.dumps({"model": target.model, "prompt": "def f(x):", "max_tokens": 4, **fields}).encode()
    return JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _say(door: Door, data: bytes, seconds: float = LONGEST) -> bytes:
    """Send it, and wait until the server closes."""
    async with door.open() as line:
        await line.send(data)
        await line.read(seconds)
        return bytes(line.received)


async def _drip(line: Line, data: bytes, rng: Random) -> None:
    """Byte by byte, until the server has had enough."""
    until = asyncio.get_running_loop().time() + LONGEST
    pause = rng.choice([0.01, 0.1, 1.0])
    for byte in data:
        if not await line.send(bytes([byte])) or line.closed or asyncio.get_running_loop().time() > until:
            return
        await line.read(pause)


async def never_speaks(door: Door, rng: Random, target: Target) -> bytes:
    return await _say(door, b"", rng.uniform(1, LONGEST))


async def many_that_never_speak(door: Door, rng: Random, target: Target) -> bytes:
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(door.open()) for _ in range(64)]
        await asyncio.gather(*(line.read(rng.uniform(1, LONGEST)) for line in lines))
        return b"".join(line.received for line in lines)


async def headers_that_stop(door: Door, rng: Random, target: Target) -> bytes:
    whole = completion(target)
    return await _say(door, whole[: rng.randrange(1, whole.index(b"\r\n\r\n") + 3)])


async def slow_headers(door: Door, rng: Random, target: Target) -> bytes:
    async with door.open() as line:
        await _drip(line, GET[:-2] + b"X-A: b\r\n" * 500, rng)
        return bytes(line.received)


async def endless_headers(door: Door, rng: Random, target: Target) -> bytes:
    begin, more = rng.choice(
        [(GET[:-4] + b"\r\nX-A: ", b"a"), (GET[:-4] + b"\r\nX", b"a"), (b"GET /", b"a"), (b"", b"A"), (b"", b"\r\n"),
         (GET[:-2], b"X-A: b\r\n"), (GET[:-2], b"A:\r\n"), (GET[:-4], b"\r\n b"), (b"GET / HTTP/1.1\r\nX: ", b"\x00")]
    )  # fmt: skip
    return await _endless(door, begin, more * (8192 // len(more)), 512)


async def endless_body(door: Door, rng: Random, target: Target) -> bytes:
    length = b"Content-Length: 99999999999\r\n\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    begin, more = rng.choice(
        [(JSON + length, b" " * 65536), (JSON + chunked, b"10000\r\n" + b" " * 65536 + b"\r\n"),
         (JSON + chunked, b"1\r\n \r\n" * 4096), (JSON + chunked + b"0\r\n", b"X-A: b\r\n" * 4096),
         (JSON + chunked + b"1", b";a=b" * 4096), (JSON + chunked, b"0" * 65536)]
    )  # fmt: skip
    return await _endless(door, begin, more, 2048)


async def _endless(door: Door, begin: bytes, more: bytes, times: int) -> bytes:
    async with door.open() as line:
        taken = await line.send(begin)
        for _ in range(times if taken else 0):
            if not await line.send(more):
                break
        await line.read(1.0)
        return bytes(line.received)


async def body_that_stops(door: Door, rng: Random, target: Target) -> bytes:
    whole = completion(target, stream=rng.random() < 0.5)
    begin = whole.index(b"\r\n\r\n") + 4
    if rng.random() < 0.5:
        return await _say(door, JSON + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\r\n")
    return await _say(door, whole[: rng.randrange(begin, len(whole))])


async def slow_body(door: Door, rng: Random, target: Target) -> bytes:
    async with door.open() as line:
        begin, _, body = completion(target).partition(b"\r\n\r\n")
        await line.send(begin + b"\r\n\r\n")
        await _drip(line, body, rng)
        await line.read(5.0)
        return bytes(line.received)


async def lengths_that_lie(door: Door, rng: Random, target: Target) -> bytes:
    header = rng.choice(LYING_LENGTHS)
    body = rng.choice(
        [b"{}", b"FFFFFFFFFFFFFFFF\r\n{}", b"-1\r\n{}\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"zz\r\n", b"2\n{}\n0\n\n"]
    )
    return await _say(door, JSON + header + b"\r\n\r\n" + body, 5.0)


async def pipeline(door: Door, rng: Random, target: Target) -> bytes:
    one = rng.choice(
        [GET, completion(target), completion(target, stream=True), b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"]
    )
    async with door.open() as line:
        sending = asyncio.create_task(line.send(one * rng.choice([2, 8, 17, 1000, 20_000])))
        await line.read(rng.uniform(1, 10))
        sending.cancel()
        return bytes(line.received)


async def leaves(door: Door, rng: Random, target: Target) -> bytes:
    """In the middle of its answer, or before."""
    fields = {"n": rng.choice([1, 8, 64]), "max_tokens": 500, "stream": rng.random() < 0.7, "ignore_eos": True}
    async with door.open() as line:
        await line.send(completion(target, **fields))
        await line.read(rng.choice([0.0, 0.01, 0.2, 1.0]), most=rng.choice([1, 2000]))
        if rng.random() < 0.5:
            line.leave()
        return bytes(line.received)


async def says_goodbye_early(door: Door, rng: Random, target: Target) -> bytes:
    """Closes its own direction and listens on."""
    async with door.open() as line:
        await line.send(completion(target, stream=rng.random() < 0.5))
        line.hang_up()
        await line.read(10.0)
        return bytes(line.received)


async def does_not_read(door: Door, rng: Random, target: Target) -> bytes:
    fields = {"n": rng.choice([4, 16]), "max_tokens": 900, "stream": True, "ignore_eos": True, "logprobs": 5}
    async with door.open(receive_buffer=2048) as line:
        await line.send(completion(target, **fields))
        await asyncio.sleep(rng.uniform(1, LONGEST))
        await line.read(0.1)
        return bytes(line.received)


async def reads_slowly(door: Door, rng: Random, target: Target) -> bytes:
    async with door.open(receive_buffer=2048) as line:
        await line.send(completion(target, max_tokens=900, stream=True, ignore_eos=True))
        for _ in range(int(LONGEST)):
            await line.read(1.0, most=100)
            if not line.closed:
                await asyncio.sleep(0.5)
        return bytes(line.received)


async def garbage(door: Door, rng: Random, target: Target) -> bytes:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500)  # of TLS
    said = rng.choice([rng.randbytes(rng.choice([1, 100, 100_000])), hello, *NONSENSE])
    return await _say(door, said, 5.0)


async def upgrades(door: Door, rng: Random, target: Target) -> bytes:
    protocol = rng.choice([b"websocket", b"h2c", b"TLS/1.0"])
    head = GET[:-2].replace(b"/health", rng.choice([b"/health", b"/v1/completions", b"/"]))
    asked = (
        b"Connection: Upgrade\r\nUpgrade: "
        + protocol
        + b"\r\nSec-WebSocket-Key: YQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    return await _say(door, head + asked + rng.randbytes(50), 5.0)


async def waits_for_continue(door: Door, rng: Random, target: Target) -> bytes:
    return await _say(door, JSON + b"Expect: 100-continue\r\nContent-Length: 50\r\n\r\n", rng.uniform(1, 10))


_ALL: tuple[Attack, ...] = (
    never_speaks,
    many_that_never_speak,
    headers_that_stop,
    slow_headers,
    endless_headers,
    endless_body,
    body_that_stops,
    slow_body,
    lengths_that_lie,
    pipeline,
    leaves,
    says_goodbye_early,
    does_not_read,
    reads_slowly,
    garbage,
    upgrades,
    waits_for_continue,
)
ATTACKS = {attack.__name__.replace("_", " "): attack for attack in _ALL}


def endless_choice(rng: Random) -> Iterator[str]:
    """Names of attacks: all of them in turns, each time in another order."""
    names = list(ATTACKS)
    while True:
        rng.shuffle(names)
        yield from names
