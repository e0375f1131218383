"""Tensors that are cut over processes (DTensors): what is here of them, and the whole."""

from __future__ import annotations

from typing import cast

from torch import Tensor
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
