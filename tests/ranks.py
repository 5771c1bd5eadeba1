"""Ranks as threads of one process, each with its own real gloo group."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from stepladder.parallel.mesh import Mesh, join
from stepladder.parallel.shards import Shard

T = TypeVar("T")


def run_ranks(tp: int, fn: Callable[[Mesh], T], timeout: float = 20.0) -> list[T]:
    """`fn(mesh)` on every rank of a group of `tp`, all at once; the results, rank by rank.

    A rank that fails leaves its group, which makes the others fail in their collectives; the first failure is raised
    here. `timeout` (seconds) bounds each collective. A rank that is done waits for the others before it leaves.
    """
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    finished = threading.Barrier(tp)
    failures: list[BaseException] = []

    def rank_main(rank: int) -> T:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        mesh = join(store, Shard(rank, tp), timeout=timedelta(seconds=timeout))
        try:
            result = fn(mesh)
            finished.wait()
            return result
        except BaseException as error:
            failures.append(error)
            finished.abort()
            raise
        finally:
            mesh.close()

    with ThreadPoolExecutor(tp) as pool:
        ranks = [pool.submit(rank_main, rank) for rank in range(tp)]
    if failures:
        raise failures[0]
    return [rank.result() for rank in ranks]
