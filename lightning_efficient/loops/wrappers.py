"""What is around a model and its optimizer in other libraries' loops."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_efficient.common.eager import inside_compiled


def bare_model(model: nn.Module) -> nn.Module:
    """Without wrappers that pass everything on to one module: DDP's, ``torch.compile``'s, Fabric's."""
    while True:
        inner = inside_compiled(model)
        if inner is None and (isinstance(model, DistributedDataParallel) or type(model).__name__ == "_FabricModule"):
            inner = getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


def bare_optimizer(optimizer: Any) -> Optimizer:
    """torch's optimizer, inside Fabric's or accelerate's wrapper.

    Raises:
        TypeError: There is none.
    """
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), Optimizer):  # accelerate's is an Optimizer itself
        found = inner
    if not isinstance(found, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer or a wrapper of one; got {type(found).__name__}.")
    return found
