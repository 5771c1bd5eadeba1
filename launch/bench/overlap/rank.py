"""One rank process of the overlap suite: what it loads, and what one case takes on it."""

import atexit
from collections.abc import Callable
from functools import partial
from time import perf_counter, process_time

import torch
import torch.distributed as dist

from stepladder.launch.bench.overlap.steps import Steps, orders, random_model
from stepladder.launch.bench.overlap.task import WIRINGS, Answer, Shapes, Task
from stepladder.launch.bench.rig.late import LateGroup
from stepladder.launch.bench.rig.meeting import meet, settle
from stepladder.launch.bench.rig.priority import communication_first
from stepladder.launch.bench.rig.processes import TIMEOUT, Start, serve
from stepladder.launch.bench.rig.spans import Recorder
from stepladder.parallel.mesh import Group, Mesh
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import Shard

LOOKS = 4  # steps of each wiring with counters on and a trace; more where a case has many rounds, as short steps do


def rank_of(start: Start[Shapes], store: dist.Store) -> Callable[[Task], Answer]:
    kind = LateGroup if start.device == "cpu" else Group
    shard = Shard(start.rank, start.ranks)
    mesh = kind(dist.PrefixStore("overlap", store), shard, start.device, start.host, TIMEOUT)
    atexit.register(mesh.close)
    if start.device == "cpu":
        communication_first()
    return partial(measure, random_model(start.model.spec(), mesh, start.model.balance), mesh)


def measure(model: Transformer, mesh: Group, task: Task) -> Answer:
    """All that one case takes; every rank does the same."""
    if isinstance(mesh, LateGroup):
        mesh.late = task.late
    steps = Steps(model, mesh, task.case)
    size = (task.case.tokens, model.spec.hidden_size)
    answer = Answer({}, [], [], [], {})
    for number, order in enumerate([*orders(1), *orders(task.rounds)]):
        seconds = {variant: steps(variant) for variant in order}
        (lone, cpu), (pair, _) = (_reduces(mesh, size, model.spec.dtype, count) for count in (1, 2))
        if number:  # the first warms up
            answer.reduce.append(lone)
            answer.reduce_cpu.append(cpu)
            answer.pair.append(pair)
            for variant, one in seconds.items():
                answer.steps.setdefault(variant, []).append(one)
    looks = [steps.blocks_alone() for _ in range(LOOKS)]
    answer.blocks.update({name: sorted(look[name] for look in looks)[LOOKS // 2] for name in looks[0]})
    if mesh.device.type == "cpu":
        for wiring in WIRINGS:
            _look(answer, wiring, steps, mesh, task)
    return answer


def _reduces(mesh: Mesh, size: tuple[int, int], dtype: torch.dtype, count: int) -> tuple[float, float]:
    """Seconds from the first issue to the last completion of `count` reduces issued together, and this process's
    CPU seconds meanwhile."""
    tensors = [torch.ones(size, dtype=dtype, device=mesh.device) for _ in range(count)]
    meet(mesh)
    began, busy = perf_counter(), process_time()
    for pending in [mesh.all_reduce(tensor) for tensor in tensors]:
        pending.wait()
    settle(mesh)
    return perf_counter() - began, process_time() - busy


def _look(answer: Answer, wiring: str, steps: Steps, mesh: Group, task: Task) -> None:
    """Some steps with the group's counters on and a trace, both of the same reduces."""
    mesh.meter.total = mesh.meter.exposed = 0.0
    answer.spans[wiring] = []
    for _ in range(max(LOOKS, task.rounds // 3)):
        recorder = Recorder(task.late)
        blocks = [recorder.block(block, f"block {k}", block.lag) for k, block in enumerate(steps.blocks[wiring])]
        meet(mesh)
        mesh.meter.on = True
        steps.run_eagerly(blocks, recorder.reduce(mesh.all_reduce))
        mesh.meter.on = False
        answer.spans[wiring].append(recorder.spans)
    answer.hidden[wiring] = mesh.meter.hidden_share or 0.0


if __name__ == "__main__":
    serve(rank_of, Start[Shapes], Task)
