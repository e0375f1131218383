"""Schedulers keep one entry per parameter group: make them follow when an optimizer gets more groups."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

# The per-group lists of every scheduler in torch.optim (a test looks for others), then timm's. A list of any
# other name is not per group because it happens to be as long: think of phases, or of nested schedulers.
PER_GROUP = frozenset(
    {
        "base_lrs",
        "_last_lr",
        "lr_lambdas",
        "min_lrs",
        "max_lrs",
        "base_momentums",
        "max_momentums",
        "base_values",
        "warmup_steps",
    }
)
_NEVER_PER_GROUP = frozenset({"milestones", "decay_t"})


def all_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """These schedulers and the ones inside them, each once.

    Args:
        schedulers: Schedulers, such as ``SequentialLR``, ``ChainedScheduler`` or user-written ones that hold
            another scheduler in an attribute or a list.
    """
    found: dict[int, Any] = {}

    def visit(scheduler: Any) -> None:
        if id(scheduler) in found:
            return
        found[id(scheduler)] = scheduler
        for value in vars(scheduler).values():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, LRScheduler):
                    visit(item)

    for scheduler in schedulers:
        visit(scheduler)
    return list(found.values())


def scale_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiply learning rates, those that schedulers will set among them.

    Args:
        optimizers: All their groups.
        schedulers: Theirs, nested ones included. A floor (``eta_min``, ``min_lrs``) stays where it is.
        factor: On every rate.
    """
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if isinstance(group.get(name), torch.Tensor):
                group[name].mul_(factor)  # a captured graph reads this one
            elif name in group:
                group[name] *= factor
    for scheduler in all_schedulers(schedulers):
        for name in ("base_lrs", "max_lrs", "_last_lr", "base_values"):
            if isinstance(rates := getattr(scheduler, name, None), list):
                setattr(scheduler, name, [rate * factor for rate in rates])


def grow_schedulers(optimizer: Optimizer, schedulers: Iterable[Any], sources: Sequence[int]) -> None:
    """Give each new group the schedule of the group it was copied from.

    Args:
        optimizer: Its last ``len(sources)`` groups are new.
        schedulers: Its schedulers, nested ones included; those of other optimizers are left alone.
        sources: For each new group, the index of the group it follows.

    Raises:
        ValueError: A scheduler class from outside torch would not drive the new groups like their source
            groups, whether its unknown lists are grown or not. Some schedulers may have been grown by then.
    """
    groups = len(optimizer.param_groups) - len(sources)
    for scheduler in all_schedulers(schedulers):
        if getattr(scheduler, "optimizer", None) is not optimizer:
            continue
        lists = {
            name: value
            for name, value in vars(scheduler).items()
            if isinstance(value, list | tuple) and len(value) == groups
        }
        _grow(scheduler, {name: value for name, value in lists.items() if name in PER_GROUP}, sources)
        unknown = {
            name: value
            for name, value in lists.items()
            if name not in PER_GROUP | _NEVER_PER_GROUP and not any(isinstance(item, LRScheduler) for item in value)
        }
        if unknown and not type(scheduler).__module__.startswith("torch.optim"):
            _grow_unknown(scheduler, unknown, sources)


def _grow(scheduler: Any, lists: dict[str, Any], sources: Sequence[int]) -> None:
    for name, value in lists.items():
        # A new list each time: SequentialLR and its current child share one `_last_lr`.
        setattr(scheduler, name, type(value)([*value, *(_own(value[source]) for source in sources)]))


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _grow_unknown(scheduler: Any, lists: dict[str, Any], sources: Sequence[int]) -> None:
    """Length does not tell a per-group list from, say, two phases for two groups: ask the scheduler."""
    name, found = type(scheduler).__name__, ", ".join(sorted(lists))
    if not hasattr(scheduler, "get_lr"):
        warnings.warn(
            f"{name} keeps lists as long as the optimizer has groups ({found}). They were left alone; if they"
            " hold one entry per group, the groups added for new parameters keep a constant learning rate.",
            UserWarning,
            stacklevel=2,
        )
    elif not _drives_all_groups(scheduler, sources):
        _grow(scheduler, lists, sources)
        if not _drives_all_groups(scheduler, sources):
            raise ValueError(
                f"{name} does not give the added parameter groups the learning rate of those they were copied"
                f" from, with or without one more entry in {found}. Use a scheduler that computes its rates"
                f" from the optimizer's groups, or from lists called {', '.join(sorted(PER_GROUP))}."
            )


def _drives_all_groups(scheduler: Any, sources: Sequence[int]) -> bool:
    groups: list[dict[str, Any]] = scheduler.optimizer.param_groups
    before = [dict(group) for group in groups]
    trial = copy.copy(scheduler)  # what get_lr() notes down must not reach the real one
    trial._get_lr_called_within_step = True  # torch's own way to say "no warning, please"
    try:
        rates = list(trial.get_lr())
    except Exception:  # a user's class may fail in any way on a list that is too short
        return False
    finally:
        for group, saved in zip(groups, before, strict=True):
            group.update(saved)
    first = len(groups) - len(sources)
    return len(rates) == len(groups) and all(
        rates[first + offset] == rates[source] for offset, source in enumerate(sources)
    )


def snapshot(schedulers: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each scheduler, nested ones included, with its attributes as they are now.

    Args:
        schedulers: Top-level schedulers.
    """
    for scheduler in all_schedulers(schedulers):
        yield scheduler, dict(vars(scheduler))


Scheduler = LRScheduler | ReduceLROnPlateau


def adopt_untrained_groups(
    checkpoint: dict[str, Any],
    index: int,
    optimizer: Optimizer,
    new: Sequence[tuple[nn.Parameter, nn.Parameter]],
    schedulers: Sequence[Scheduler],
) -> None:
    """Append the groups that ``optimizer`` has and the checkpoint lacks to the checkpoint, in place, without state.

    They take over the learning rate, the schedule and everything else the checkpoint has for the groups they follow.

    Args:
        checkpoint: A Lightning checkpoint that is about to be restored.
        index: Position of ``optimizer`` in the Trainer.
        optimizer: The optimizer, its new groups at the end.
        new: (new parameter, source weight) pairs, as given to ``add_parameters``.
        schedulers: All schedulers of the Trainer, in order, already grown.
    """
    saved = checkpoint["optimizer_states"][index]["param_groups"]
    live = optimizer.state_dict()["param_groups"]
    home = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    follows = {home[parameter]: home[source] for parameter, source in new}
    if len(saved) + len(follows) != len(live):
        return  # not the same optimizer: torch says so when it loads the state
    for group, source in sorted(follows.items()):
        own = {key: live[group][key] for key in ("params", "weight_decay", "name", "param_names") if key in live[group]}
        saved.append({**deepcopy(saved[source]), **own})
    sources = [source for _, source in sorted(follows.items())]
    for state, scheduler in zip(checkpoint.get("lr_schedulers", []), schedulers, strict=False):
        if scheduler.optimizer is optimizer:
            _grow_group(state, scheduler.state_dict(), len(live), sources)


def _grow_group(saved: dict[str, Any], live: dict[str, Any], groups: int, sources: Sequence[int]) -> None:
    for key, value in saved.items():
        other = live.get(key)
        if key == "_schedulers" and isinstance(other, list):
            for inner, inner_live in zip(value, other, strict=True):
                _grow_group(inner, inner_live, groups, sources)
        elif isinstance(value, list) and isinstance(other, list) and len(other) == groups == len(value) + len(sources):
            saved[key] = [*value, *(deepcopy(value[source]) for source in sources)]


def take_added_groups(
    checkpoint: dict[str, Any],
    index: int,
    optimizer: Optimizer,
    added: Sequence[tuple[nn.Parameter, nn.Parameter]],
    schedulers: Sequence[Scheduler],
) -> dict[nn.Parameter, dict[str, Any]]:
    """Take groups that ``optimizer`` lacks out of a checkpoint, in place: earlier versions left some there.

    Args:
        checkpoint: A Lightning checkpoint that is about to be restored.
        index: Position of ``optimizer`` in the Trainer.
        optimizer: The optimizer, without the parameters.
        added: (parameter, source weight) pairs, as ``add_parameters`` was given them.
        schedulers: All schedulers of the Trainer, in order.

    Returns:
        Parameter → the state that the checkpoint had of it; empty where it has no such groups.
    """
    home = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter, source in added:
        groups.setdefault(home[source], []).append(parameter)
    state, live = checkpoint["optimizer_states"][index], len(optimizer.param_groups)
    behind = state["param_groups"][live:]
    if [len(group["params"]) for group in behind] != [len(parameters) for parameters in groups.values()]:
        return {}
    places = [place for group in behind for place in group["params"]]
    parameters = [parameter for group in groups.values() for parameter in group]
    found = {p: state["state"].pop(i, {}) for i, p in zip(places, parameters, strict=True)}
    del state["param_groups"][live:]
    for saved, scheduler in zip(checkpoint.get("lr_schedulers", []), schedulers, strict=False):
        if scheduler.optimizer is optimizer:
            _shrink_groups(saved, scheduler.state_dict(), live, live + len(groups))
    return found


def _shrink_groups(saved: dict[str, Any], live: dict[str, Any], groups: int, before: int) -> None:
    for key, value in saved.items():
        other = live.get(key)
        if key == "_schedulers" and isinstance(other, list):
            for inner, inner_live in zip(value, other, strict=True):
                _shrink_groups(inner, inner_live, groups, before)
        elif isinstance(value, list) and isinstance(other, list) and (len(value), len(other)) == (before, groups):
            saved[key] = value[:groups]
