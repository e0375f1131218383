"""Tensors that are cut over processes (DTensors): what is here of them, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor, or a parameter, is spread over a mesh of processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What is here of a tensor, without its history: a view that may be written to, as ``tensor.data`` is.

    Args:
        tensor: Of one process, or cut over several.
    """
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.data


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without its history; every process that holds a part has to ask.

    Args:
        tensor: Of one process: itself. Cut over several: gathered, so not for what runs in every step.
    """
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gather_anew(model: nn.Module) -> None:
    """Have the next forward gather FSDP's parameters anew: an evaluation leaves some gathered, as they were then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of several tensors together, without their history; those that are cut may be so in several ways.

    Args:
        tensors: At least one.
    """
    kinds: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    norms = [whole(nn.utils.get_total_norm(some)) for some in kinds.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
