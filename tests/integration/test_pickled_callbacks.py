"""What the strategy ``ddp_spawn`` sends to its processes, without the processes: the battery has a few with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_models import GridClassifier
from sigma_runs import trainer
from zoo import Classifier, loader

import lightning_efficient as le

MAKERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "sigma_reparam": ("encoder", le.SigmaReparam),
    "norm_swap": ("encoder", partial(le.PRepBN, transition=3, hold=1)),
    "linear_attention": ("grid", le.SimplifiedLinearAttention),
    "temp_scale": ("encoder", partial(le.TempScale, tau=0.6, learnable=True)),
    "temp_scale_adapter": ("capped", partial(le.TempScale, tau=0.6, learnable=True)),
    "magnitude_pruning": ("cnn", partial(le.MagnitudePruning, start=1, length=3, every=1)),
    "sap_pruning": ("cnn", partial(le.SAPPruning, p=1.0, q=2.0, iterations=2)),
    "hesso_pruning": ("cnn", partial(le.HESSOPruning, start=1, duration=3, periods=2)),
    "pagcp_pruning": (
        "cnn", partial(le.PAGCPPruning, budgets={"val_loss": 2.0}, start=1, rounds=2, every=2, step=0.25, most=0.5),
    ),
    "collapse_monitor": ("timm_vit", le.CollapseMonitor),
    "distillation": ("cnn", le.Distillation),
    "collapse_guard": ("cnn", partial(le.CollapseGuard, every_n_steps=2)),
    "neural_collapse_monitor": ("cnn", le.NeuralCollapseMonitor),
    "posterior_collapse_monitor": ("cnn", partial(le.PosteriorCollapseMonitor, mu="net.head")),
    "state_drift_monitor": ("cnn", partial(le.StateDriftMonitor, module="net.stem", train_length=2)),
    "representation_monitor": ("cnn", partial(le.RepresentationMonitor, module="net.head")),
    "fixed_etf_head": ("cnn", partial(le.FixedETFHead, include=["net.head"], steps=5)),
    "adaptive_gradient_modulation": (
        "halves",
        partial(le.AdaptiveGradientModulation, modalities={"upper": 0, "lower": "lower"}, module="net.both"),
    ),
    "module_timer": ("cnn", partial(le.ModuleTimer, table=False)),
    "padding_report": ("cnn", partial(le.PaddingReport, mask="1")),
    "run_cost": ("cnn", le.RunCost),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:PAGCPPruning pruned nothing")  # as in its battery
@pytest.mark.parametrize("method", MAKERS)
def test_a_pickled_callback_trains_as_it_would_have(method: str, tmp_path: Path) -> None:
    """Before a run, as it is sent; and after one, when it holds what belonged to that run."""
    net, make = MAKERS[method]

    def trained(callback: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        module = GridClassifier(net) if net == "grid" else Classifier(net)
        trainer(tmp_path, callback, max_steps=6).fit(module, loader(6), loader(1))
        return module.state_dict()

    used = make()
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(used))
        expected, result = trained(used), trained(copy)
        assert expected.keys() == result.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(result[name], value), name
