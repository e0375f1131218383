"""Tensors made smaller in place, and the optimizer's memory of them with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Kept = Mapping[int, Tensor]


def cut_tensor(tensor: Tensor, kept: Kept) -> None:
    """Leave only some entries of a tensor, and of its gradient, in place: it stays the same object.

    Args:
        tensor: A parameter or buffer.
        kept: Axis → bool, as long as the axis is: True where an entry stays.
    """
    grad = tensor.grad
    tensor.grad = None
    tensor.data = selected(tensor.data, kept)
    if grad is not None:
        tensor.grad = selected(grad, kept)


def selected(tensor: Tensor, kept: Kept) -> Tensor:
    """The entries that stay, as a new tensor.

    Args:
        tensor: Any.
        kept: Axis → bool, as long as the axis is.
    """
    for dim, mask in kept.items():
        tensor = tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
    return tensor.contiguous()


def cut_states(optimizers: Iterable[Optimizer], cuts: Mapping[nn.Parameter, Kept]) -> dict[str, int]:
    """Leave only the entries that stay of what optimizers remember of parameters that were cut.

    Everything that had the parameter's shape (momentum, second moments) is cut like it; counters and other single
    numbers stay. A memory in another form (factored, quantized, flattened over parameters) cannot be cut: it goes
    altogether, for that parameter, with one warning. Doing it twice changes nothing more.

    Args:
        optimizers: Optimizers of the model.
        cuts: ``Change.cuts``.

    Returns:
        Counts: ``state_cut`` and ``state_dropped``, in parameters.
    """
    counts = {"state_cut": 0, "state_dropped": 0}
    names = set()
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):  # one flat memory of all parameters, kept with the first
            members = [p for group in optimizer.param_groups for p in group["params"]]
            if optimizer.state and any(p in cuts for p in members):
                optimizer.state.clear()
                optimizer._numel_cache = None
                names.add("LBFGS")
                counts["state_dropped"] += sum(p in cuts for p in members)
            continue
        for parameter, kept in cuts.items():
            state = optimizer.state.get(parameter)
            if not state or _fits(state, parameter):
                continue
            smaller = _cut_state(state, _shape_before(parameter, kept), kept)
            if smaller is None:
                del optimizer.state[parameter]
                names.add(type(optimizer).__name__)
            else:
                state.update(smaller)
            counts["state_dropped" if smaller is None else "state_cut"] += 1
    if counts["state_dropped"]:
        warnings.warn(
            f"{', '.join(sorted(names))} keeps its memory of {counts['state_dropped']} cut parameters in a form that "
            "cannot be cut with them (factored, quantized or flattened); it was dropped and builds up anew.",
            UserWarning,
            stacklevel=2,
        )
    return counts


def _shape_before(parameter: Tensor, kept: Kept) -> torch.Size:
    shape = list(parameter.shape)
    for dim, mask in kept.items():
        shape[dim] = mask.numel()
    return torch.Size(shape)


def _fits(state: Mapping[str, Any], parameter: Tensor) -> bool:
    return all(t.shape == parameter.shape or t.numel() <= 1 for t in state.values() if isinstance(t, Tensor))


def _cut_state(state: Mapping[str, Any], before: torch.Size, kept: Kept) -> dict[str, Any] | None:
    """The state's tensors of the old shape, cut; None if it holds others."""
    smaller = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and type(value) is Tensor and value.shape == before:
            smaller[key] = selected(value, kept)
        elif (isinstance(value, Tensor) and value.numel() > 1) or (isinstance(value, (list, tuple, Mapping)) and value):
            return None
    return smaller
