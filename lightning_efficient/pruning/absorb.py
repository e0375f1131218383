"""What units send when they are zero, moved into the biases of what reads them: activations with f(0) ≠ 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_efficient.attention.sites import as_probe
from lightning_efficient.pruning.groups import Groups, Slice, check_keep
from lightning_efficient.surgery.match import modules_by_name
from lightning_efficient.surgery.tracking import evaluating

_CONSTANT = 1e-5  # relative to the largest input; in float32


@torch.no_grad()
def absorb_constants(
    model: nn.Module, example: Any, keep: Mapping[str, Iterable[int]], groups: Groups
) -> dict[str, str]:
    """Zero the units that do not stay, and add what still comes from them to the biases of their readers, in place.

    Behind a sigmoid a zero becomes 0.5, at every position and for every input: a constant, which its readers can hold
    themselves. Cut with :func:`~lightning_efficient.pruning.slim.apply_slim` afterwards. Convolutions with padding see
    no constant at the border, so there the result is near, not equal.

    Args:
        model: The model; only these units and the biases change.
        example: As for :func:`~lightning_efficient.pruning.graph.find_groups`.
        keep: Group → indices of the units that stay.
        groups: From ``find_groups(..., inexact=True)``.

    Returns:
        Reader → what was done, or why it could not be.

    Raises:
        ValueError: See :func:`~lightning_efficient.pruning.groups.check_keep`.
    """
    units, probe, modules = check_keep(groups, keep), as_probe(model, example), modules_by_name(model)
    parameters = dict(model.named_parameters())
    readers: dict[str, tuple[Slice, list[int]]] = {}
    for name, stay in units.items():
        group = groups.found[name]
        gone = sorted(set(range(group.units)) - set(stay))
        group.zero(parameters, gone)
        for part in group.consumed:
            readers[part.name.rpartition(".")[0]] = (part, gone)
    inputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0]

        return hook

    handles = [modules[name].register_forward_pre_hook(keeper(name)) for name in readers]
    try:
        with evaluating(model):
            model(*probe.args, **probe.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _absorb(modules[name], inputs.get(name), *found) for name, found in readers.items()}


def _absorb(reader: nn.Module, value: Tensor | None, part: Slice, gone: list[int]) -> str:
    weight, bias = getattr(reader, "weight", None), getattr(reader, "bias", None)
    plain = isinstance(reader, nn.Linear) or (isinstance(reader, _ConvNd) and reader.groups == 1)
    if value is None or not plain or not isinstance(weight, Tensor):
        return "left: not a linear layer or a plain convolution that ran"
    axis = value.ndim - 1 if isinstance(reader, nn.Linear) else 1
    entries = part.entries(gone).to(value.device)
    columns = value.index_select(axis, entries).movedim(axis, 0).flatten(1)
    constant = columns[:, 0]
    if float((columns - constant[:, None]).abs().max()) > _CONSTANT * float(value.abs().max()):
        return "left: what comes from the units is not constant"
    if not bool(constant.any()):
        return "nothing comes from the units"
    if not isinstance(bias, Tensor):
        return "left: it has no bias to hold a constant"
    taps = weight.index_select(part.dim, entries).movedim(part.dim, 1).flatten(2).sum(-1) if weight.ndim > 2 else None
    bias += (weight.index_select(part.dim, entries) if taps is None else taps) @ constant
    return "absorbed"
