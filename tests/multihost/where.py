"""On which host each gang of a deployment runs, asked by a process on the head's host.

python -m tests.multihost.where NAME GANG=GENERATION...       prints {gang: address of its first rank} as JSON
"""

import json
import sys

import ray

from stepladder.cluster.names import namespace


def main(name: str, *gangs: str) -> None:
    ray.init(namespace=namespace(name), log_to_driver=False, logging_level="ERROR")
    places = {}
    for gang, generation in (pair.split("=") for pair in gangs):
        actor = ray.get_actor(f"{name}/{generation}/{gang}/0")
        places[gang] = ray.get(actor.where.remote(), timeout=30).host
    print(json.dumps(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
