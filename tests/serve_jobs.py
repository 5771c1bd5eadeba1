"""Jobs on a private Ray, one after the other: `python -P tests/serve_jobs.py JSON`, with the code that Python finds.

JSON is a list of [name, folder or null, words of the command]. Prints a list of what each deployment said of its
version, how many tokens it generated, and the processes of its actors.
"""

import json
import os
import sys

import psutil
import requests

from stepladder.launch.deployed import ready
from stepladder.launch.private_ray import PrivateRay

ACTORS = ("ray::ControllerActor", "ray::GatewayActor", "ray::RankActor")


def main() -> None:
    os.environ["RAY_JOB_STOP_WAIT_TIME_S"] = "60"
    with PrivateRay(num_cpus=2) as ray:
        print(json.dumps([serve(ray, *job) for job in json.loads(sys.argv[1])]))


def serve(ray: PrivateRay, name: str, folder: str | None, command: list[str]) -> dict:
    """Submit, ask, stop, and wait until its processes are gone."""
    where = ("--working-dir", folder) if folder else ()
    ray.job("submit", "--no-wait", "--submission-id", name, *where, "--", *command)
    url = ready(ray, name)
    processes = {actor: ray.processes(actor) for actor in ACTORS}
    version = requests.get(f"{url}/version", timeout=10).json()["version"]
    body = {"model": "demo", "prompt": "def main():", "max_tokens": 8, "ignore_eos": True}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()
    ray.job("stop", name)
    psutil.wait_procs([process for found in processes.values() for process in found], timeout=30)
    pids = {actor: [process.pid for process in found] for actor, found in processes.items()}
    return {"version": version, "tokens": answer["usage"]["completion_tokens"], "pids": pids}


if __name__ == "__main__":
    main()
