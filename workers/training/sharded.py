"""DeepSpeed around a module and its optimizer, whose state the ranks share among them (ZeRO): what any objective trains
with. Weights, gradients and reductions are fp32; bf16 is torch's autocast, around the objective."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from stepladder.workers.training.ranks import Ranks

__all__ = ["MODEL_STATES", "STAGES", "Sharded"]

BUCKET = 5_000_000  # elements reduced at a time
MODEL_STATES = "mp_rank_00_model_states.pt"  # DeepSpeed's name for the weights and what was saved beside them
KEPT_WHOLE = 100_000  # elements of a parameter that is not worth to be cut up at stage 3
STAGES = (1, 2, 3)  # the ranks share the optimizer's state; the gradients too; the weights too


class Sharded:
    """All ranks call everything here, in the same order. What rank 0's module holds is where all begin.

    Args:
        module: fp32, on the ranks' device; its parameters are what `optimizer` has.
        windows: samples of one micro-batch of one rank. accumulate: micro-batches of a step.
        clip: the gradient's largest norm. stage: of ZeRO, one of `STAGES`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        ranks: Ranks,
        windows: int,
        accumulate: int = 1,
        clip: float | None = None,
        stage: int = 1,
    ) -> None:
        import deepspeed
        from deepspeed.utils import logger

        assert stage in STAGES
        logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # On CPU DeepSpeed would compile a C++ all-reduce for inference, for two minutes; training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {
            "train_micro_batch_size_per_gpu": windows,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": clip or 0.0,
            "steps_per_print": 10**12,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": ranks.device.type == "cuda",
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "stage3_param_persistence_threshold": KEPT_WHOLE,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.module, self.optimizer, self.stage = module, optimizer, stage
        made = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
        self._engine = made[0]

    def __call__(self, *inputs: Any) -> Any:
        """What the module makes of them. At stage 3 each micro-batch must go through here, once: whole weights are
        only met with on the way, and gradients would replace those of the micro-batch before."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch are added up."""
        self._engine.backward(loss)

    def step(self) -> None:
        """DeepSpeed counts micro-batches in it: after each one; the last one's is the optimizer's step."""
        self._engine.step()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole module's, on every rank."""
        with self._gathered():
            return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Rank 0's weights become those of all ranks (others' are not looked at); the optimizer starts anew."""
        with self._gathered(changed=True):
            for name, tensor in self.module.state_dict().items():
                if dist.get_rank() == 0:
                    tensor.copy_(weights[name])
                if self.stage < 3:  # else leaving the context does that
                    dist.broadcast(tensor, 0)
        self._engine.optimizer.refresh_fp32_params()
        for state in self.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def save_checkpoint(self, directory: Path, tag: str, state: dict[str, Any]) -> None:
        """In a folder `tag` of the directory; `state` beside it."""
        self._engine.save_checkpoint(str(directory), tag=tag, client_state={"training": state}, save_latest=False)

    @staticmethod
    def saved_state(directory: Path, tag: str) -> dict[str, Any]:
        """What was saved beside the weights."""
        states = torch.load(directory / tag / MODEL_STATES, map_location="cpu", mmap=True, weights_only=False)
        state: dict[str, Any] = states["training"]
        return state

    def load_checkpoint(self, directory: Path, tag: str) -> None:
        """Go on from there."""
        self._engine.load_checkpoint(str(directory), tag=tag)

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self._engine.destroy()

    def _gathered(self, changed: bool = False) -> Any:
        """Within it the module's weights are whole, whatever the stage."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0 if changed else None)
