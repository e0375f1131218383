"""Efficient-training methods as PyTorch Lightning callbacks: apply, train, save, resume, evaluate, export.

Importing the package imports nothing else: Lightning loads it at every ``Trainer()`` through an entry point (see
``_switch.py``), and whoever does not use it must not pay for it.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_efficient.ablate.run import ablate
    from lightning_efficient.callbacks.collapse_monitor import CollapseMonitor
    from lightning_efficient.callbacks.hesso_pruning import HESSOPruning
    from lightning_efficient.callbacks.linear_attention import SimplifiedLinearAttention
    from lightning_efficient.callbacks.magnitude_pruning import MagnitudePruning
    from lightning_efficient.callbacks.pagcp_pruning import PAGCPPruning
    from lightning_efficient.callbacks.prepbn import PRepBN
    from lightning_efficient.callbacks.run_cost import RunCost
    from lightning_efficient.callbacks.sap_pruning import SAPPruning
    from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
    from lightning_efficient.callbacks.temp_scale import TempScale
    from lightning_efficient.checkpoint import load_from_checkpoint
    from lightning_efficient.cli.efficient_cli import EfficientCLI
    from lightning_efficient.export import export

    __version__: str

__all__ = [
    "CollapseMonitor",
    "EfficientCLI",
    "HESSOPruning",
    "MagnitudePruning",
    "PAGCPPruning",
    "PRepBN",
    "RunCost",
    "SAPPruning",
    "SigmaReparam",
    "SimplifiedLinearAttention",
    "TempScale",
    "ablate",
    "export",
    "load_from_checkpoint",
]

_HOMES = {
    "CollapseMonitor": "lightning_efficient.callbacks.collapse_monitor",
    "EfficientCLI": "lightning_efficient.cli.efficient_cli",
    "HESSOPruning": "lightning_efficient.callbacks.hesso_pruning",
    "MagnitudePruning": "lightning_efficient.callbacks.magnitude_pruning",
    "PAGCPPruning": "lightning_efficient.callbacks.pagcp_pruning",
    "PRepBN": "lightning_efficient.callbacks.prepbn",
    "RunCost": "lightning_efficient.callbacks.run_cost",
    "SAPPruning": "lightning_efficient.callbacks.sap_pruning",
    "SigmaReparam": "lightning_efficient.callbacks.sigma_reparam",
    "SimplifiedLinearAttention": "lightning_efficient.callbacks.linear_attention",
    "TempScale": "lightning_efficient.callbacks.temp_scale",
    "ablate": "lightning_efficient.ablate.run",
    "export": "lightning_efficient.export",
    "load_from_checkpoint": "lightning_efficient.checkpoint",
}


def _callbacks_from_environment() -> list[Any]:
    """What Lightning calls at every ``Trainer()``: here, so that a run without the switch reads one file of ours."""
    if not (os.environ.get("LIGHTNING_EFFICIENT") or os.environ.get("LIGHTNING_EFFICIENT_RUN")):
        return []
    from lightning_efficient._switch import callbacks_from_environment

    return callbacks_from_environment()


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("lightning-efficient")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """The package, whose function ``export`` is not hidden once its submodule of the same name has been imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
