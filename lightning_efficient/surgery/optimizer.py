"""The user's optimizers after surgery: built as if nothing had happened, then pointed at what is there."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.common.change import Change
from lightning_efficient.surgery.replace import reinstate_modules, restore_modules
from lightning_efficient.surgery.schedulers import Scheduler, grow_schedulers, snapshot


@contextmanager
def plain_view(model: nn.Module, changes: Sequence[Change]) -> Iterator[None]:
    """Inside, the model has its original modules back, so that user code runs as if untouched.

    Grouping parameters by name, ``ndim``, module type or attribute then does what its author meant. The
    parameters it finds are the original ones: call ``rebind`` on the optimizers it makes.

    Args:
        model: The changed model.
        changes: All changes made to it, in the order in which they were made.

    Raises:
        ValueError: A change does not belong to this model (it was rebuilt since); the model is as it was.
    """
    undone: list[Change] = []
    try:
        for change in reversed(changes):
            restore_modules(model, change.swaps)
            undone.append(change)
        yield
    finally:
        for change in reversed(undone):
            reinstate_modules(model, change.swaps)


def rebind(
    optimizers: Sequence[Optimizer],
    changes: Sequence[Change],
    schedulers: Sequence[Scheduler] = (),
    model: nn.Module | None = None,
) -> dict[str, int]:
    """Point optimizers at the parameters that changes left behind, in place.

    A replaced parameter's successor takes its position in its group, and its state if the shapes agree (a
    state with parts missing would make most optimizers fail, so otherwise all of it goes, with one warning).
    Removed parameters leave groups and state; groups stay, even when empty. Added ones go through
    ``add_parameters``; one that follows a frozen weight in no optimizer is frozen with it. Doing it twice changes
    nothing more.

    Args:
        optimizers: All optimizers of the model.
        changes: All changes made to it, in order.
        schedulers: All schedulers of these optimizers.
        model: Only for names in messages.

    Returns:
        Counts: ``replaced``, ``removed``, ``added`` parameters, ``state_moved``, ``state_dropped``.

    Raises:
        ValueError: A new trainable parameter would be in no optimizer or in several places. Nothing is
            changed then.
    """
    plan = _compose(changes)
    after = [_groups_after(optimizer, plan) for optimizer in optimizers]
    homes, frozen = _homes_of_added(optimizers, after, plan, model)
    places = Counter(new for groups in after for group in groups for _, new in group)
    places.update(new for pairs in homes for new, _ in pairs)
    for new in plan.replaced.values():
        if new.requires_grad and new not in plan.removed and places[new] != 1:
            raise ValueError(_misplaced(plan.name(new, model), places[new]))
    counts = dict.fromkeys(("replaced", "removed", "added", "state_moved", "state_dropped"), 0)
    with _undone_on_error(optimizers, schedulers):
        for optimizer, new_parameters in zip(optimizers, homes, strict=True):
            add_parameters(optimizer, new_parameters, schedulers)
            counts["added"] += len(new_parameters)
    for optimizer, groups in zip(optimizers, after, strict=True):
        _commit(optimizer, groups, counts)
    for parameter in frozen:
        parameter.requires_grad_(False)
    if counts["state_dropped"]:
        warnings.warn(
            f"The optimizer state of {counts['state_dropped']} replaced parameters was dropped, because their shape"
            " changed; it builds up anew.",
            UserWarning,
            stacklevel=2,
        )
    return counts


def add_parameters(
    optimizer: Optimizer,
    new: Sequence[tuple[nn.Parameter, nn.Parameter]],
    schedulers: Sequence[Scheduler] = (),
) -> None:
    """Put new parameters into groups that equal those of the weights they belong to, without weight decay.

    One group is added per group that holds a source weight: same learning rate, betas, ``initial_lr``,
    ``max_lr`` and whatever else it has, ``weight_decay`` 0, a ``name`` of its own if the source group has
    one. The optimizer's schedulers get the entries they need to treat it like its source group.

    Args:
        optimizer: The optimizer that holds every source weight.
        new: (new parameter, source weight) pairs.
        schedulers: Schedulers; those of other optimizers are left alone.

    Raises:
        ValueError: A source is in no group, a new parameter is in one already or given twice, or this
            optimizer or one of its schedulers cannot take it. Nothing is changed then.
    """
    if isinstance(optimizer, torch.optim.LBFGS) and new:
        raise ValueError("LBFGS allows one parameter group only, so it cannot take added parameters; use another.")
    position = {p: (i, j) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}
    members: dict[int, list[tuple[nn.Parameter, nn.Parameter]]] = {}
    for parameter, source in new:
        if source not in position:
            raise ValueError(
                f"The weight of shape {tuple(source.shape)} that an added parameter belongs to is not in this"
                f" {type(optimizer).__name__}; expected it in one of its {len(optimizer.param_groups)} groups."
            )
        if parameter in position or any(parameter is other for pairs in members.values() for other, _ in pairs):
            raise ValueError(f"The parameter of shape {tuple(parameter.shape)} to add is in the optimizer already.")
        if isinstance(optimizer, getattr(torch.optim, "Muon", ())) and parameter.ndim != 2:
            raise ValueError(
                f"Muon optimizes matrices only, so the added parameter of shape {tuple(parameter.shape)} cannot join"
                " the group of its weight: exclude that weight from the method, or give it to another optimizer."
            )
        members.setdefault(position[source][0], []).append((parameter, source))
    with _undone_on_error([optimizer], schedulers):
        for index, pairs in members.items():
            optimizer.add_param_group(_zero_decay_copy(optimizer, index, pairs, position))
        if members:
            grow_schedulers(optimizer, schedulers, list(members))


def _zero_decay_copy(
    optimizer: Optimizer,
    index: int,
    pairs: list[tuple[nn.Parameter, nn.Parameter]],
    position: dict[nn.Parameter, tuple[int, int]],
) -> dict[str, Any]:
    source: dict[str, Any] = optimizer.param_groups[index]
    group = {
        key: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)
        for key, value in source.items()
        if key not in ("params", "param_names")
    }
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    if "name" in group:
        group["name"] = _unique(f"{source['name']}_no_decay", {g.get("name") for g in optimizer.param_groups})
    group["params"] = [parameter for parameter, _ in pairs]
    if "param_names" in source:  # torch wants names in every group or in none
        taken = {name for g in optimizer.param_groups for name in g["param_names"]}
        named = []
        for parameter, weight in pairs:
            name = _unique(f"{source['param_names'][position[weight][1]]}.added", taken)
            taken.add(name)
            named.append((name, parameter))
        group["params"] = named
    return group


def _unique(name: str, taken: set[Any]) -> str:
    candidates = (name if n == 1 else f"{name}_{n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


@contextmanager
def _undone_on_error(optimizers: Sequence[Optimizer], schedulers: Sequence[Scheduler]) -> Iterator[None]:
    lengths = [len(optimizer.param_groups) for optimizer in optimizers]
    attributes = list(snapshot(schedulers))
    try:
        yield
    except BaseException:
        for optimizer, length in zip(optimizers, lengths, strict=True):
            del optimizer.param_groups[length:]
        for scheduler, saved in attributes:
            vars(scheduler).update(saved)
        raise


@dataclass
class _Plan:
    """Several changes as one: what became of each original parameter in the end."""

    replaced: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    removed: set[nn.Parameter] = field(default_factory=set)
    added: list[tuple[nn.Parameter, nn.Parameter | None]] = field(default_factory=list)
    names: dict[nn.Parameter, str] = field(default_factory=dict)

    def name(self, parameter: nn.Parameter, model: nn.Module | None) -> str:
        """What to call a parameter in a message."""
        names = self.names if model is None else {p: name for name, p in model.named_parameters()} | self.names
        return names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")


def _compose(changes: Sequence[Change]) -> _Plan:
    plan = _Plan()
    for change in changes:
        for old, new in change.replaced:
            for first, last in plan.replaced.items():
                if last is old:
                    plan.replaced[first] = new
            plan.replaced[old] = new
        plan.added += change.added
        plan.removed -= {new for _, new in change.replaced} | {new for new, _ in change.added}
        gone = set(change.removed)
        plan.removed |= gone | {first for first, last in plan.replaced.items() if last in gone}
        for name, (_, module) in change.swaps.items():
            plan.names |= {p: f"{name}.{local}" for local, p in module.named_parameters()}
        for new, _ in change.added:
            plan.names.setdefault(new, f"a parameter of shape {tuple(new.shape)} added by {change.method}")
    latest = plan.replaced.get
    final = {latest(p, p): None if s is None else latest(s, s) for p, s in plan.added}
    plan.added = [(new, source) for new, source in final.items() if new not in plan.removed]
    return plan


Groups = list[list[tuple[nn.Parameter, nn.Parameter]]]


def _groups_after(optimizer: Optimizer, plan: _Plan) -> Groups:
    """Per group, (parameter now, parameter then), without those that leave."""
    present = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    placed: set[nn.Parameter] = set()
    groups: Groups = []
    for group in optimizer.param_groups:
        groups.append([])
        for old in group["params"]:
            new = plan.replaced.get(old, old)
            # Two parameters may have become one, or this may be done already: one place is enough.
            doubled = new in placed or (new is not old and new in present)
            if old not in plan.removed and not doubled:
                placed.add(new)
                groups[-1].append((old, new))
    return groups


def _homes_of_added(
    optimizers: Sequence[Optimizer], after: list[Groups], plan: _Plan, model: nn.Module | None
) -> tuple[list[list[tuple[nn.Parameter, nn.Parameter]]], list[nn.Parameter]]:
    """Per optimizer, (added parameter, the parameter in it now whose group it follows); those of frozen weights.

    Lightning's BackboneFinetuning freezes a part of the network but for its batch norms, which a new one may be.
    """
    now = [{new: old for group in groups for old, new in group} for groups in after]
    homes: list[list[tuple[nn.Parameter, nn.Parameter]]] = [[] for _ in optimizers]
    frozen: list[nn.Parameter] = []
    for new, source in plan.added:
        places = sum(new in origin for origin in now)
        found = [i for i, origin in enumerate(now) if source in origin]
        if source is None and len(now) == 1 and now[0]:
            source, found = next(iter(now[0])), [0]
        if places == 0 and len(found) == 1 and source is not None:
            homes[found[0]].append((new, now[found[0]][source]))
        elif places == 0 and not found and source is not None and not source.requires_grad:
            frozen.append(new)
        elif new.requires_grad and places != 1:
            weight = "no particular weight" if source is None else plan.name(source, model)
            raise ValueError(_misplaced(plan.name(new, model), places or len(found), weight))
    return homes, frozen


def _misplaced(name: str, places: int, weight: str | None = None) -> str:
    follows = f" (it follows {weight})" if weight else ""
    if places == 0:
        return (
            f"{name}{follows} is trainable but its weight is in no optimizer, so it would silently not be trained."
            " Give the weight to an optimizer, set requires_grad=False on it, or add its module to `exclude`."
        )
    return (
        f"{name}{follows} would be in {places} optimizers or groups; expected exactly one. Give its weight to one"
        " optimizer only, or add its module to `exclude`."
    )


def _commit(optimizer: Optimizer, groups: Groups, counts: dict[str, int]) -> None:
    for group, pairs in zip(optimizer.param_groups[: len(groups)], groups, strict=True):
        kept = dict(pairs)
        if "param_names" in group:
            named = zip(group["params"], group["param_names"], strict=True)
            group["param_names"][:] = [name for old, name in named if old in kept]
        for old in group["params"]:
            if old not in kept:
                optimizer.state.pop(old, None)
                counts["removed"] += 1
            elif kept[old] is not old:
                counts["replaced"] += 1
                _move_state(optimizer, old, kept[old], counts)
        group["params"][:] = [new for _, new in pairs]  # in place: LBFGS and user code hold this list


def _move_state(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, counts: dict[str, int]) -> None:
    state = optimizer.state.pop(old, None)
    if not state:
        return
    if new.shape != old.shape:
        counts["state_dropped"] += 1
        return
    counts["state_moved"] += 1
    optimizer.state[new] = {
        # Step counters live on the CPU even when the parameter does not.
        key: value.to(new.device) if isinstance(value, torch.Tensor) and value.device == old.device else value
        for key, value in state.items()
    }
