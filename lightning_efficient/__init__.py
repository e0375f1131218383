"""Efficient-training methods as PyTorch Lightning callbacks: apply, train, save, resume, evaluate, export.

Importing the package imports nothing else: Lightning loads it at every ``Trainer()`` through an entry point (see
``_switch.py``), and whoever does not use it must not pay for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_efficient.ablation.run import ablate
    from lightning_efficient.attention.sites import find_attention
    from lightning_efficient.callbacks.adaptive_gradient_modulation import AdaptiveGradientModulation
    from lightning_efficient.callbacks.collapse_guard import CollapseGuard
    from lightning_efficient.callbacks.collapse_monitor import CollapseMonitor
    from lightning_efficient.callbacks.distillation import Distillation
    from lightning_efficient.callbacks.fixed_etf_head import FixedETFHead
    from lightning_efficient.callbacks.hesso_pruning import HESSOPruning
    from lightning_efficient.callbacks.linear_attention import SimplifiedLinearAttention
    from lightning_efficient.callbacks.magnitude_pruning import MagnitudePruning
    from lightning_efficient.callbacks.module_timer import ModuleTimer
    from lightning_efficient.callbacks.neural_collapse_monitor import NeuralCollapseMonitor
    from lightning_efficient.callbacks.padding_report import PaddingReport
    from lightning_efficient.callbacks.pagcp_pruning import PAGCPPruning
    from lightning_efficient.callbacks.posterior_collapse_monitor import PosteriorCollapseMonitor
    from lightning_efficient.callbacks.prepbn import PRepBN
    from lightning_efficient.callbacks.representation_monitor import RepresentationMonitor
    from lightning_efficient.callbacks.run_cost import RunCost
    from lightning_efficient.callbacks.sap_pruning import SAPPruning, sap_fits
    from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
    from lightning_efficient.callbacks.state_drift_monitor import StateDriftMonitor
    from lightning_efficient.callbacks.temp_scale import TempScale
    from lightning_efficient.cli.efficient_cli import EfficientCLI
    from lightning_efficient.common.change import Change
    from lightning_efficient.common.match import select_modules
    from lightning_efficient.companions.samplers import (
        BalancedDistributedBatchSampler,
        LengthGroupedBatchSampler,
        TokenBudgetBatchSampler,
    )
    from lightning_efficient.comparison import compare, read_runs
    from lightning_efficient.deploy.export import export
    from lightning_efficient.deploy.folder import save_pretrained
    from lightning_efficient.deploy.formats import save_exported
    from lightning_efficient.deploy.measure import log_exported, slim_report
    from lightning_efficient.deploy.semi_structured import to_semi_structured
    from lightning_efficient.lifecycle.base import EfficientCallback
    from lightning_efficient.lifecycle.cuts import cut
    from lightning_efficient.lifecycle.files import CheckpointError
    from lightning_efficient.lifecycle.load import load_from_checkpoint
    from lightning_efficient.lifecycle.methods import register_method
    from lightning_efficient.lifecycle.recipe import RecipeError
    from lightning_efficient.lifecycle.structural import StructuralCallback
    from lightning_efficient.lifecycle.weights import Plan, WeightSpaceCallback
    from lightning_efficient.loops.driver import Driver, attach
    from lightning_efficient.loops.huggingface import EfficientTrainerCallback
    from lightning_efficient.surgery.replace import replace_modules
    from lightning_efficient.trainer.tensorboard import plot_sap_curve
    from lightning_efficient.tuning.validation import tune_on_validation
    from lightning_efficient.weightspace import Transform

    __version__: str

# Public name -> where it lives. No module of the package hides a thing of its name that is public here when it is
# imported: `export`, the only one, is both.
_HOMES = {
    "AdaptiveGradientModulation": "callbacks.adaptive_gradient_modulation",
    "BalancedDistributedBatchSampler": "companions.samplers",
    "Change": "common.change",
    "CheckpointError": "lifecycle.files",
    "CollapseGuard": "callbacks.collapse_guard",
    "CollapseMonitor": "callbacks.collapse_monitor",
    "Distillation": "callbacks.distillation",
    "Driver": "loops.driver",
    "EfficientCLI": "cli.efficient_cli",
    "EfficientCallback": "lifecycle.base",
    "EfficientTrainerCallback": "loops.huggingface",
    "FixedETFHead": "callbacks.fixed_etf_head",
    "HESSOPruning": "callbacks.hesso_pruning",
    "LengthGroupedBatchSampler": "companions.samplers",
    "MagnitudePruning": "callbacks.magnitude_pruning",
    "ModuleTimer": "callbacks.module_timer",
    "NeuralCollapseMonitor": "callbacks.neural_collapse_monitor",
    "PAGCPPruning": "callbacks.pagcp_pruning",
    "PRepBN": "callbacks.prepbn",
    "PaddingReport": "callbacks.padding_report",
    "Plan": "lifecycle.weights",
    "PosteriorCollapseMonitor": "callbacks.posterior_collapse_monitor",
    "RecipeError": "lifecycle.recipe",
    "RepresentationMonitor": "callbacks.representation_monitor",
    "RunCost": "callbacks.run_cost",
    "SAPPruning": "callbacks.sap_pruning",
    "SigmaReparam": "callbacks.sigma_reparam",
    "SimplifiedLinearAttention": "callbacks.linear_attention",
    "StateDriftMonitor": "callbacks.state_drift_monitor",
    "StructuralCallback": "lifecycle.structural",
    "TempScale": "callbacks.temp_scale",
    "TokenBudgetBatchSampler": "companions.samplers",
    "Transform": "weightspace",
    "WeightSpaceCallback": "lifecycle.weights",
    "ablate": "ablation.run",
    "attach": "loops.driver",
    "compare": "comparison",
    "cut": "lifecycle.cuts",
    "export": "deploy.export",
    "find_attention": "attention.sites",
    "load_from_checkpoint": "lifecycle.load",
    "log_exported": "deploy.measure",
    "plot_sap_curve": "trainer.tensorboard",
    "read_runs": "comparison",
    "register_method": "lifecycle.methods",
    "replace_modules": "surgery.replace",
    "sap_fits": "callbacks.sap_pruning",
    "save_exported": "deploy.formats",
    "save_pretrained": "deploy.folder",
    "select_modules": "common.match",
    "slim_report": "deploy.measure",
    "to_semi_structured": "deploy.semi_structured",
    "tune_on_validation": "tuning.validation",
}

__all__ = [
    "AdaptiveGradientModulation",
    "BalancedDistributedBatchSampler",
    "Change",
    "CheckpointError",
    "CollapseGuard",
    "CollapseMonitor",
    "Distillation",
    "Driver",
    "EfficientCLI",
    "EfficientCallback",
    "EfficientTrainerCallback",
    "FixedETFHead",
    "HESSOPruning",
    "LengthGroupedBatchSampler",
    "MagnitudePruning",
    "ModuleTimer",
    "NeuralCollapseMonitor",
    "PAGCPPruning",
    "PRepBN",
    "PaddingReport",
    "Plan",
    "PosteriorCollapseMonitor",
    "RecipeError",
    "RepresentationMonitor",
    "RunCost",
    "SAPPruning",
    "SigmaReparam",
    "SimplifiedLinearAttention",
    "StateDriftMonitor",
    "StructuralCallback",
    "TempScale",
    "TokenBudgetBatchSampler",
    "Transform",
    "WeightSpaceCallback",
    "ablate",
    "attach",
    "compare",
    "cut",
    "export",
    "find_attention",
    "load_from_checkpoint",
    "log_exported",
    "plot_sap_curve",
    "read_runs",
    "register_method",
    "replace_modules",
    "sap_fits",
    "save_exported",
    "save_pretrained",
    "select_modules",
    "slim_report",
    "to_semi_structured",
    "tune_on_validation",
]


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

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
