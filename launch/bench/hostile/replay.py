"""Send one forged request again and show it and its answer: `python -m launch.bench.hostile.replay URL SEED NUMBER`."""

import asyncio
import sys
from urllib.parse import urlsplit

import requests

from stepladder.cluster.gateway.reading import body_bytes
from stepladder.launch.bench.hostile.attacker import send
from stepladder.launch.bench.hostile.fuzz import Target, forge
from stepladder.launch.bench.hostile.line import Door

SHOWN = 2000  # bytes


def door_of(url: str) -> Door:
    """Raises ValueError: it is not on this machine. Nothing else is ever attacked."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    if host not in ("127.0.0.1", "localhost") or not port:
        raise ValueError(f"{url} is not http://127.0.0.1:PORT; only servers on this machine are attacked")
    return Door(host, port)


def target_of(url: str) -> Target:
    """As /v1/models tells it of a server with the usual limits."""
    card = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]
    return Target(card["id"], body_bytes(card["max_model_len"]))


def main(url: str, seed: str, number: str) -> None:
    forged = forge(int(seed), int(number), target_of(url))
    print(f"# {forged.what}\n{forged.raw()[:SHOWN]!r}\n")
    print(asyncio.run(send(door_of(url), forged, 60.0))[:SHOWN].decode(errors="replace"))


if __name__ == "__main__":
    main(*sys.argv[1:])
