"""A stand-in for a LightningModule: the same networks and steps, but nothing it logs or counts is the module's own.

Running ``training_step`` or ``validation_step`` a further time, to measure something, would log twice, add to the
user's metrics and to the lists that outputs are collected in. On the stand-in it does not.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

_CONTAINERS = (list, dict, set, tuple, deque, defaultdict, OrderedDict, Counter)
# What draws numbers: a copy of its own goes on from the same state.
_STATEFUL = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What logs or counts.
_APART = {Metric, LightningModule}
_Holder = TypeVar("_Holder", bound=nn.Module | LightningDataModule)


def stand_in(
    pl_module: LightningModule, log: Callable[..., None] | None = None, swapped: Mapping[int, Any] | None = None
) -> LightningModule:
    """A module of the same class that shares every network with ``pl_module``.

    Metrics, random generators and containers (lists, dicts, sets, deques) held as attributes are copies. What was set
    on the instance in place of a method of the class (compiled steps, our hooks) is left out: those would act on the
    original. LightningModules inside it are stood in for alike. Under manual optimization its optimizers and schedulers
    do not step, but ``manual_backward`` gives gradients to the parameters.

    Args:
        pl_module: The original; it is not touched.
        log: Called with the arguments of ``self.log``; None: nothing is logged.
        swapped: ``id`` of a module, parameter or buffer → what takes its place.
    """
    return _Builder(log, swapped or {}).module(pl_module)  # type: ignore[return-value]


def data_stand_in(data: LightningDataModule) -> LightningDataModule:
    """A LightningDataModule that shares its data; what its hooks count or collect is not the original's.

    Args:
        data: The original; it is not touched.
    """
    twin = _bare(data)
    twin.__dict__.update(_Builder(None, {}).attributes(data))
    return twin


class _Builder:
    def __init__(self, log: Callable[..., None] | None, swapped: Mapping[int, Any]) -> None:
        self.log, self.swapped = log, swapped
        self._made: dict[int, nn.Module] = {}

    def module(self, module: nn.Module) -> nn.Module:
        """The module itself, or where it logs or counts, a shallow copy of it that does so apart."""
        module = self.swapped.get(id(module), module)
        if id(module) in self._made:
            return self._made[id(module)]
        if Metric in type(module).__mro__:
            return self._made.setdefault(id(module), deepcopy(module))
        # Not `isinstance`: that asks every subclass of an abstract class, of which torchmetrics has hundreds.
        if all(_APART.isdisjoint(type(m).__mro__) for m in module.modules()):
            return self._made.setdefault(id(module), module)
        twin = self._made[id(module)] = _bare(module)
        twin.__dict__.update(self.attributes(module))
        if isinstance(twin, LightningModule):
            self._silence(twin)
        return twin

    def _silence(self, twin: LightningModule) -> None:
        attributes = twin.__dict__
        for name in [n for n, v in attributes.items() if callable(v) and callable(getattr(type(twin), n, None))]:
            del attributes[name]

        def log_one(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if self.log is not None:
                self.log(name, value, *args, **kwargs)

        def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            for name, value in dictionary.items():
                log_one(name, value, *args, **kwargs)

        attributes |= {"log": log_one, "log_dict": log_dict, "print": _nothing, "manual_backward": _backward}
        attributes |= {name: partial(_idle, getattr(twin, name)) for name in ("optimizers", "lr_schedulers")}
        attributes |= dict.fromkeys(("toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _nothing)

    def attributes(self, holder: nn.Module | LightningDataModule) -> dict[str, Any]:
        """What an object holds, containers of its own."""
        return {name: self._fresh(value) for name, value in vars(holder).items()}

    def _fresh(self, value: Any) -> Any:
        """A container of its own; what lies in it stays, unless it counts, draws or is swapped."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if id(value) in self.swapped:
            return self.swapped[id(value)]
        if isinstance(value, _STATEFUL):
            return deepcopy(value)
        if type(value) not in _CONTAINERS:
            return value
        if isinstance(value, dict):
            fresh = copy(value)
            fresh.update({key: self._fresh(item) for key, item in value.items()})
            return fresh
        items = [self._fresh(item) for item in value]
        return deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)


def _bare(holder: _Holder) -> _Holder:
    return type(holder).__new__(type(holder))


class _Idle:
    """An optimizer or a scheduler to be asked, whose steps do nothing."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Copies: a step may write learning rates into them."""
        return [dict(group) for group in self._of.param_groups]

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Of an optimizer, runs the closure if there is one."""
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are put back by whoever runs the stand-in."""

    def toggle_model(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return nullcontext()


def _idle(found: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands for ``optimizers`` and ``lr_schedulers``."""
    given = found(*args, **kwargs)
    if isinstance(given, list):
        return [_Idle(one) for one in given]
    return None if given is None else _Idle(given)


def _backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Stands for ``manual_backward``: what comes after it may read gradients, or go on with the graph."""
    if loss.requires_grad:
        loss.backward(*args, **{**kwargs, "retain_graph": True})  # type: ignore[no-untyped-call]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for ``print`` and the like."""
