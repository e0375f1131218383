"""Several processes in a loop of one's own: DDP, and nothing that cuts parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_efficient.common.shards import is_cut


def several() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_whole(model: nn.Module) -> None:
    """Refuse parameters that are cut over processes.

    Args:
        model: As the user has it.

    Raises:
        ValueError: One is.
    """
    cut = next((name for name, parameter in model.named_parameters() if is_cut(parameter)), None)
    flat = next((name for name, m in model.named_modules() if isinstance(m, FullyShardedDataParallel)), None)
    if cut is not None or flat is not None:
        raise ValueError(
            f"{cut or flat or type(model).__name__!r} is cut over processes (FSDP, tensor parallel), which works in no "
            "loop of your own. Use DDP, or the callbacks in a Lightning Trainer with ModelParallelStrategy."
        )


def check_same_gradients(parameters: Sequence[nn.Parameter], who: str) -> None:
    """Refuse parameters whose gradients nobody averages; every process has to ask.

    Args:
        parameters: Of this process, before a step.
        who: Whose they are.

    Raises:
        RuntimeError: They differ between processes.
    """
    sums = [torch.zeros((), device=p.device) if p.grad is None else p.grad.float().sum() for p in parameters]
    least, most = torch.stack(sums), torch.stack(sums)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    if not torch.equal(least.nan_to_num(), most.nan_to_num()):
        raise RuntimeError(
            f"{who}: the gradients of its new parameters differ between processes, so that these would drift apart. "
            "Call `attach` before the model is wrapped (DistributedDataParallel, `fabric.setup`, "
            "`accelerator.prepare`)."
        )
