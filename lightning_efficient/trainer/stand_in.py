"""A stand-in for a LightningModule: the same networks and steps, but nothing it logs or counts is the module's own.

Running ``training_step`` or ``validation_step`` a further time, to measure something, would log twice, add to the
user's metrics and to the lists that outputs are collected in. On the stand-in it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

_CONTAINERS = (list, dict, set)


def shadow(pl_module: LightningModule, log: Callable[..., None] | None = None) -> LightningModule:
    """A module of the same class that shares every network with ``pl_module``.

    Metrics and built-in containers (lists, dicts, sets) held as attributes are copies. What was set on the instance in
    place of a method of the class (compiled steps, our hooks) is left out: those would act on the original.

    Args:
        pl_module: The original; it is not touched.
        log: Called with the arguments of ``self.log``; None: nothing is logged.
    """
    twin = _shallow(pl_module)
    attributes = twin.__dict__
    for name in [n for n, v in attributes.items() if callable(v) and callable(getattr(type(twin), n, None))]:
        del attributes[name]

    def log_one(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if log is not None:
            log(name, value, *args, **kwargs)

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log_one(name, value, *args, **kwargs)

    attributes |= {"log": log_one, "log_dict": log_dict, "print": _nothing}
    return twin


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for ``print``."""


def _shallow(module: LightningModule) -> LightningModule:
    twin = _twin(module)
    assert isinstance(twin, LightningModule)
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """The module itself, or where it holds metrics, a shallow copy of it with copies of those."""
    if isinstance(module, Metric):
        return deepcopy(module)
    if not isinstance(module, LightningModule) and not any(isinstance(m, Metric) for m in module.modules()):
        return module
    twin = type(module).__new__(type(module))
    twin.__dict__.update({name: _fresh(value) for name, value in module.__dict__.items()})
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    return twin


def _fresh(value: Any) -> Any:
    """A container of its own; what lies in it stays, except for containers in a list or dict."""
    if type(value) is list:
        return [_fresh(item) if type(item) in _CONTAINERS else item for item in value]
    if type(value) is dict:
        return {key: _fresh(item) if type(item) in _CONTAINERS else item for key, item in value.items()}
    return set(value) if type(value) is set else value
