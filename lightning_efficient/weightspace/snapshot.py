"""Going back: a copy of a training state, and putting it back under the masks of today.

The lottery ticket needs the weights of an early step, and the rest of the training state with them: momentum that
belongs to other weights, or a learning rate at the end of its schedule, would make another experiment of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.schema import ListOf, MapOf, Plain, Record, TensorOf, Text
from lightning_efficient.weightspace import Site
from lightning_efficient.weightspace.mask import MaskTransform, forget, set_mask

_TENSORS = MapOf(Text(), TensorOf())
SNAPSHOT = Record(
    {
        "model": _TENSORS,
        "transforms": MapOf(Text(), MapOf(Text(), _TENSORS)),
        "optimizers": ListOf(Plain(tensors=True)),
        "schedulers": ListOf(Plain(tensors=True)),
    }
)


@dataclass
class Snapshot:
    """A training state at one step: everything but the masks, the step counter and the data.

    Args:
        model: Parameter or buffer → value; parameters as the network uses them (``Ŵ``).
        transforms: Parameter → kind of transform → its state, masks left out; ``"raw"`` where ``W`` is kept beside.
        optimizers: Their state dictionaries.
        schedulers: Likewise.
    """

    model: dict[str, Tensor]
    transforms: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)

    def as_plain(self) -> dict[str, Any]:
        """The snapshot as plain data, for a checkpoint."""
        return dict(vars(self))


@torch.no_grad()
def take(
    model: nn.Module,
    sites: Mapping[str, Site],
    optimizers: Sequence[Optimizer] = (),
    schedulers: Sequence[Any] = (),
) -> Snapshot:
    """Copy a training state.

    Args:
        model: All its parameters and buffers are copied, those of batch norm included.
        sites: Parameter → the transforms on it.
        optimizers: Of the run.
        schedulers: Of the run.
    """
    transforms: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, site in sites.items():
        transforms[name] = {t.kind: t.state_dict() for t in site.chain if not isinstance(t, MaskTransform)}
        if site.raw is not None:
            transforms[name]["raw"] = {"raw": site.raw.clone()}
    return Snapshot(
        {name: value.detach().clone() for name, value in tensors(model).items()},
        transforms,
        [deepcopy(optimizer.state_dict()) for optimizer in optimizers],
        [deepcopy(scheduler.state_dict()) for scheduler in schedulers],
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer of a model, under its name.

    What a module does not save is not learned: where a schedule stands, for instance, which goes on by the step.
    """
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def rewind(
    snapshot: Snapshot,
    model: nn.Module,
    sites: Mapping[str, Site],
    optimizers: Sequence[Optimizer] = (),
    schedulers: Sequence[Any] = (),
    *,
    weights: bool = True,
) -> None:
    """Put a training state back; masks stay as they are today.

    Args:
        snapshot: From :func:`take`.
        model: Its parameters and buffers are overwritten in place.
        sites: Parameter → the transforms on it.
        optimizers: Those the snapshot was taken of, in the same order.
        schedulers: Likewise.
        weights: Everything. ``False``: learning rates and schedulers only, weights and their momentum stay (Renda et
            al., ICLR 2020, arXiv 2003.02389).

    Groups that an optimizer has gained since (layers that were unfrozen) go on as they are, without momentum where the
    weights go back.

    Raises:
        ValueError: The model or an optimizer has changed since in another way; nothing is changed then.
    """
    now = tensors(model)
    states = [_joined(optimizer, saved) for optimizer, saved in zip(optimizers, snapshot.optimizers, strict=True)]
    if misfits := [n for n, v in now.items() if n not in snapshot.model or snapshot.model[n].shape != v.shape]:
        raise ValueError(
            f"the training state to go back to lacks {misfits[:3]}, or has other shapes: the model was changed since."
        )
    if weights:
        for name, value in now.items():
            value.data.copy_(snapshot.model[name])
        for name, site in sites.items():
            _restore_site(site, snapshot.transforms.get(name, {}))
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    else:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key not in _STRUCTURE})
    for scheduler, state in zip(schedulers, snapshot.schedulers, strict=True):
        scheduler.load_state_dict(_grown(state, scheduler.state_dict()))
    dropped = {}
    for site in sites.values():
        for transform in site.chain:
            if isinstance(transform, MaskTransform):
                if weights and not transform.fits(site.param.detach(), 0.0):
                    set_mask(site, transform, transform.mask, advance=True)
                dropped[site.param] = transform.dropped
    forget(optimizers, dropped)


_STRUCTURE = ("params", "param_names")


def _joined(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state for an optimizer that may have more groups by now."""
    now, before = optimizer.state_dict()["param_groups"], saved["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (before, now)]
    if sizes[0] != sizes[1][: len(sizes[0])]:
        raise ValueError(
            f"{type(optimizer).__name__} had groups of {sizes[0]} parameters in the training state to go back to, now "
            f"of {sizes[1]}; only new groups behind the others can be taken along."
        )
    return {"state": deepcopy(saved["state"]), "param_groups": deepcopy(before) + deepcopy(now[len(before) :])}


def _grown(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's saved state, with the values of groups that came later."""
    state = deepcopy(dict(saved))
    for name, value in state.items():
        if isinstance(value, list) and isinstance(now.get(name), list):
            state[name] = value + deepcopy(now[name][len(value) :])
    return state


def _restore_site(site: Site, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Transforms of a snapshot, for a parameter that holds the snapshot's ``Ŵ`` already."""
    for transform in site.chain:
        if transform.kind in saved:
            transform.load_state_dict(saved[transform.kind], site.param.detach())
    if site.raw is not None and "raw" in saved:
        site.raw.copy_(saved["raw"]["raw"])


def restore_snapshot(state: Mapping[str, Any] | None) -> Snapshot | None:
    """A snapshot from a checkpoint's plain data."""
    return None if state is None else Snapshot(**state)
