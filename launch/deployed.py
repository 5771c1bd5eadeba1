"""A deployment on a private Ray, started the way a user starts one: as a Ray job."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stepladder.launch.private_ray import PrivateRay
from stepladder.launch.where import JOB_FOLDER

SERVE = ("python", "-m", "stepladder.launch.serve")


@contextmanager
def deployed(ray: PrivateRay, job: str, options: Sequence[str]) -> Iterator[str]:
    """With these options of launch.serve; yields its URL once it is ready, stops the job in the end."""
    ray.submit(job, *SERVE, *options)
    try:
        yield ready(ray, job)
    finally:
        ray.job("stop", job)


def submitting(options: Sequence[str]) -> str:
    """What a person would type."""
    return " ".join(["ray job submit", *JOB_FOLDER, "--", *SERVE, *options])


def ready(ray: PrivateRay, job: str) -> str:
    """Follow the job's log until it says where it serves.

    Raises:
        SystemExit: the job ended before; the message is its log.
    """
    log = subprocess.Popen(ray.job_command("logs", "--follow", job), env=ray.env, stdout=subprocess.PIPE, text=True)
    assert log.stdout
    try:
        for line in log.stdout:
            if line.startswith("STEPLADDER_READY "):
                return line.split()[1]
            if line.startswith("stepladder"):
                say(line.strip())
    finally:
        log.kill()
        log.wait()
        log.stdout.close()
    sys.exit(f"the job ended before it was ready:\n{ray.job('logs', job)}")


def say(text: str) -> None:
    print(f"\033[36m▸\033[0m {text}", flush=True)
