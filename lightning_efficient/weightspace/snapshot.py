"""Going back: a copy of a training state, and putting it back under the masks of today.

The lottery ticket needs the weights of an early step, and the rest of the training state with them: momentum that
belongs to other weights, or a learning rate at the end of its schedule, would make another experiment of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.nests import mapped, tensors_in
from lightning_efficient.common.schema import (
    Anything,
    Flag,
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    OrNone,
    Part,
    Plain,
    Record,
    Schema,
    TensorOf,
    Text,
    TupleOf,
    check,
)
from lightning_efficient.common.shards import is_cut, local, whole
from lightning_efficient.weightspace import Site
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.mask import MaskTransform, forget, set_mask
from lightning_efficient.weightspace.memory import without_memory
from lightning_efficient.weightspace.sums import run

_State = TypeVar("_State")
_TENSORS = MapOf(Text(), TensorOf())
_GROUP = Part({"params": ListOf(Int(low=0))})
_OPTIMIZER = Part({"state": MapOf(Int(low=0), MapOf(Text(), Plain(tensors=True))), "param_groups": ListOf(_GROUP)})
SNAPSHOT = Record(
    {
        "model": _TENSORS,
        "transforms": MapOf(Text(), MapOf(Text(), _TENSORS)),
        "optimizers": ListOf(_OPTIMIZER),
        "schedulers": ListOf(MapOf(Text(), Plain(tensors=True))),
    }
)


@dataclass
class Snapshot:
    """A training state at one step: everything but the step counter, the data and, unless asked for, the masks.

    Args:
        model: Parameter or buffer → value; parameters as the network uses them (``Ŵ``).
        transforms: Parameter → kind of transform → its state; ``"raw"`` where ``W`` is kept beside.
        optimizers: Their state dictionaries.
        schedulers: Likewise.
    """

    model: dict[str, Tensor]
    transforms: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)

    def as_plain(self) -> dict[str, Any]:
        """The snapshot as plain data, for a checkpoint; tensors that are cut over processes are gathered."""
        if not any(is_cut(tensor) for tensor in self.model.values()):
            return dict(vars(self))
        cut = {"model": self.model, "optimizers": self.optimizers}
        gathered: dict[str, Any] = mapped(cut, lambda leaf: whole(leaf) if isinstance(leaf, Tensor) else leaf)
        return vars(self) | gathered


@torch.no_grad()
def take(
    model: nn.Module,
    sites: Mapping[str, Site],
    optimizers: Sequence[Optimizer] = (),
    schedulers: Sequence[Any] = (),
    *,
    masks: bool = False,
    device: torch.device | None = None,
) -> Snapshot:
    """Copy a training state.

    Args:
        model: All its parameters and buffers are copied, those of batch norm included.
        sites: Parameter → the transforms on it.
        optimizers: Of the run.
        schedulers: Of the run.
        masks: Also those of single weights, so that :func:`rewind` brings weights back that were pruned later.
        device: Where the copies are; None: where the tensors are.
    """
    transforms: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, site in sites.items():
        kept = [t for t in site.chain if masks or not isinstance(t, MaskTransform)]
        found = {t.kind: run([site.saved(t)])[0] for t in kept}
        transforms[name] = {kind: {k: v for k, v in state.items() if k != "raw"} for kind, state in found.items()}
        if site.raw is not None:
            transforms[name]["raw"] = {"raw": site.raw}
    states = ([part.state_dict() for part in parts] for parts in (optimizers, schedulers))
    return copied(Snapshot(tensors(model), transforms, *states), device)


def copied(state: _State, device: torch.device | None = None) -> _State:
    """A copy of plain data, or a dataclass of it, that shares no tensor with the original.

    Args:
        state: Any nest; what appears in it twice is copied once.
        device: Where the copies of tensors are; None: where the tensors are.
    """
    found = tensors_in(vars(state) if is_dataclass(state) else state)
    return deepcopy(state, {id(t): t.detach().to(device or t.device, copy=True) for t in found})


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
    """Put a training state back; masks stay as they are today, unless it has some.

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
            local(value).copy_(Layout.find(name, value).here(snapshot.model[name]))
        for name, site in sites.items():
            _restore_site(site, snapshot.transforms.get(name, {}))
        for optimizer, state in zip(optimizers, states, strict=True):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            placed = {place: _beside(params[place], memory) for place, memory in state["state"].items()}
            optimizer.load_state_dict(state | {"state": placed})
    else:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key not in _STRUCTURE})
    for scheduler, state in zip(schedulers, snapshot.schedulers, strict=True):
        scheduler.load_state_dict(_grown(state, scheduler.state_dict()))
    dropped = {}
    for name, site in sites.items():
        for transform in site.chain:
            if isinstance(transform, MaskTransform):
                if weights and transform.kind in snapshot.transforms.get(name, {}):
                    continue  # mask, weight and momentum went back together
                if weights and not run([transform.fits(site.weight, 0.0)])[0]:
                    set_mask(site, transform, transform.mask, advance=True)
                dropped[site.param] = transform.dropped
    forget(optimizers, dropped)


def check_snapshot(
    snapshot: Snapshot,
    model: nn.Module,
    sites: Mapping[str, Site],
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    where: str,
    error: type[ValueError] = ValueError,
) -> None:
    """Refuse a training state from a file that :func:`rewind` could not put back; nothing is changed.

    Numbers and tensors are the user's data, as they are in the file's own states of optimizers: only their kinds and
    shapes are looked at.

    Args:
        snapshot: Fits :data:`SNAPSHOT`.
        model: As for :func:`rewind`.
        sites: Likewise.
        optimizers: Likewise, in the state in which the run goes on; none where they do not go back.
        schedulers: Likewise.
        where: Whose snapshot it is, for the error.
        error: What to raise.

    Raises:
        ValueError: ``error``, with the field and what was expected.
    """

    def ask(value: Any, schema: Schema, field: str) -> None:
        check(value, schema, f"{where}{field}", error)

    ask(snapshot.model, Part({name: _like(value) for name, value in tensors(model).items()}), "['model']")
    values = {id(value): snapshot.model[name] for name, value in tensors(model).items()}
    for name, site in sites.items():
        weight = values.get(id(site.param), site.param.detach())
        _check_site(site, snapshot.transforms.get(name, {}), weight, f"{where}['transforms'][{name!r}]", error)
    ask(snapshot.optimizers, ListOf(Anything(), length=len(optimizers)), "['optimizers']")
    later: dict[int, int] = {}
    for i, (optimizer, state) in enumerate(zip(optimizers, snapshot.optimizers, strict=True)):
        try:
            _joined(optimizer, state)
        except ValueError as misfit:
            raise error(f"{where}['optimizers'][{i}]: {misfit}") from misfit
        ask(state, _optimizer_like(optimizer, state), f"['optimizers'][{i}]")
        later[id(optimizer)] = len(optimizer.param_groups) - len(state["param_groups"])
    ask(snapshot.schedulers, ListOf(Anything(), length=len(schedulers)), "['schedulers']")
    for i, (scheduler, state) in enumerate(zip(schedulers, snapshot.schedulers, strict=True)):
        now = _as_before(scheduler.state_dict(), state, later.get(id(scheduler.optimizer), 0))
        ask(state, _like(now, _ours(scheduler)), f"['schedulers'][{i}]")


def _check_site(
    site: Site, saved: Mapping[str, Mapping[str, Tensor]], weight: Tensor, where: str, error: type[ValueError]
) -> None:
    chain = {t.kind: t for t in site.chain if not isinstance(t, MaskTransform) or t.kind in saved}
    fields = {kind: transform.state_schema(weight) for kind, transform in chain.items()}
    raw = {} if site.raw is None else {"raw": Record({"raw": _like(site.raw)})}
    own = {kind: without_memory(state) for kind, state in saved.items()}
    check(own, Part(fields | raw), where, error)
    for kind, transform in chain.items():
        try:
            deepcopy(transform).load_state_dict(own[kind], weight)
        except ValueError as misfit:
            raise error(f"{where}: {misfit}") from misfit


def _optimizer_like(optimizer: Optimizer, saved: Mapping[str, Any]) -> Schema:
    now, before = optimizer.state_dict(), saved["param_groups"]
    groups = []
    for group in now["param_groups"][: len(before)]:
        fields = {name: _like(value, _ours(optimizer)) for name, value in group.items() if name not in _STRUCTURE}
        # What others have added to a group (schedulers do) may be missing.
        needed = {name: schema for name, schema in fields.items() if name in optimizer.defaults}
        groups.append(Part({"params": TupleOf(tuple(Int(place, place) for place in group["params"]))} | needed, fields))
    places = [place for group in before for place in group["params"]]
    states = {place: _like(now["state"][place], _ours(optimizer)) for place in places if place in now["state"]}
    some = Record({}, dict.fromkeys(places, Anything()) | states)
    return Part({"param_groups": TupleOf(tuple(groups)), "state": some})


def _as_before(now: Any, saved: Any, later: int) -> Any:
    """A scheduler's state now, without the entries of groups that came later and a saved one lacks."""
    if isinstance(now, Mapping) and isinstance(saved, Mapping):
        return {name: _as_before(value, saved.get(name), later) for name, value in now.items()}
    if isinstance(now, (list, tuple)) and isinstance(saved, (list, tuple)):
        now = now[: len(saved)] if later and len(saved) + later == len(now) else now
        return [_as_before(value, saved[i] if i < len(saved) else None, later) for i, value in enumerate(now)]
    return now


def _ours(thing: Any) -> bool:
    """Whether an optimizer or scheduler is torch's: what is no number or tensor in its state does not move."""
    return type(thing).__module__.startswith("torch.optim")


def _like(now: Any, exact: bool = True) -> Schema:
    """Values of the kind of a given one: numbers and tensors may have others, the rest only if not ``exact``."""
    if isinstance(now, Tensor):
        return TensorOf(now.dtype, shape=tuple(now.shape))
    if isinstance(now, Mapping):
        return Part({name: _like(value, exact) for name, value in now.items()})
    schema: Schema
    if isinstance(now, (list, tuple)):
        schema = TupleOf(tuple(_like(item, exact) for item in now))
    elif type(now) in (int, float):
        schema = Number(finite=False)
    elif exact:
        schema = OneOf((now,)) if now is None or type(now) in (bool, str) else Plain(tensors=True)
    else:
        schema = {bool: Flag(), str: Text()}.get(type(now), Plain(tensors=True))
    return schema if exact else OrNone(schema)


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
    return {"state": saved["state"], "param_groups": deepcopy(before) + deepcopy(now[len(before) :])}


def _beside(param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's state of a parameter, cut like that."""
    layout = Layout.find("a parameter", param)

    def like(value: Any) -> Any:
        if layout.of is None or not isinstance(value, Tensor) or value.shape != param.shape:
            return deepcopy(value)
        return layout.placed(layout.here(value).clone())

    return {name: like(value) for name, value in state.items()}


def _grown(saved: Any, now: Any) -> Any:
    """A scheduler's saved state, with the values of groups that came later; of schedulers inside it, too."""
    if type(saved) is dict and type(now) is dict:  # a Counter, which a scheduler may have, stays one
        return {name: _grown(value, now.get(name)) for name, value in saved.items()}
    if isinstance(saved, list) and isinstance(now, list):
        inside = [_grown(value, now[i] if i < len(now) else None) for i, value in enumerate(saved)]
        return inside + deepcopy(now[len(saved) :])
    return deepcopy(saved)


def _restore_site(site: Site, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Transforms of a snapshot, for a parameter that holds the snapshot's ``Ŵ`` already."""
    for transform in site.chain:
        if transform.kind in saved:
            site.load(transform, saved[transform.kind])
    if site.raw is not None and "raw" in saved:
        site.raw.copy_(saved["raw"]["raw"])


def restore_snapshot(state: Mapping[str, Any] | None) -> Snapshot | None:
    """A snapshot from a checkpoint's plain data."""
    return None if state is None else Snapshot(**state)
