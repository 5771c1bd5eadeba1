"""When the ranks of a group begin together, and when what one of them has queued is done."""

import torch

from stepladder.parallel.mesh import Mesh


def meet(mesh: Mesh) -> None:
    """A moment that all ranks share."""
    mesh.all_reduce(torch.zeros(1, device=mesh.device)).wait()
    settle(mesh)


def settle(mesh: Mesh) -> None:
    """Wait for what this rank has queued on its device."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
