"""The table method × history: what a run resumes from, and what it must not believe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from grid_models import GridClassifier
from test_contract import data, variants

from lightning_efficient import (
    CollapseGuard,
    CollapseMonitor,
    Distillation,
    HESSOPruning,
    MagnitudePruning,
    PAGCPPruning,
    PRepBN,
    SAPPruning,
    SigmaReparam,
    SimplifiedLinearAttention,
    TempScale,
)
from lightning_efficient.testing import HISTORIES, assert_method_contract

# Runs of six steps; what is given as fractions must go on in the steps it had when a run becomes longer.
METHODS: dict[str, tuple[Callable[[], Any], str, bool]] = {
    "sigma_reparam": (SigmaReparam, "encoder", True),
    "norm_swap": (partial(PRepBN, target="dyt", transition=0.5, hold=0.2), "timm_vit", False),
    "norm_swap_repbn": (partial(PRepBN, transition=0.5, hold=0.2), "timm_vit", False),
    "linear_attention": (partial(SimplifiedLinearAttention, kernel_size=3), "grid", False),
    "watched": (lambda: (CollapseMonitor(every_n_steps=2), MagnitudePruning(amount=0.5)), "encoder", True),
    "guarded": (lambda: (CollapseGuard(every_n_steps=2, max_ratio=1e3), MagnitudePruning(amount=0.5)), "cnn", True),
    "taught": (lambda: (Distillation(alpha=0.3), MagnitudePruning(amount=0.5)), "cnn", True),
    "temp_scale": (partial(TempScale, tau=0.5), "timm_vit", True),
    "temp_scale_transition": (partial(TempScale, tau=0.5, transition=0.5), "encoder", True),
    "magnitude": (partial(MagnitudePruning, amount=0.5), "cnn", True),
    "iterative": (partial(MagnitudePruning, amount=0.5, schedule="iterative", rounds=2), "cnn", True),
    "sap": (partial(SAPPruning, iterations=2), "cnn", True),
    "hesso": (partial(HESSOPruning, start=0.2, duration=0.6, periods=2), "cnn", True),
    "cric": (partial(HESSOPruning, start=0, duration=0.9, periods=2, cric=True), "cnn", True),
    "pagcp": (partial(PAGCPPruning, start=0.5, most=0.3, budgets={"val_loss": 1.0}), "encoder", True),
}


# Two processes equal one only where statistics are held fixed, and these norms learn theirs.
CELLS = [(m, h) for m in METHODS for h in HISTORIES if (m, h) != ("norm_swap_repbn", "more_devices")]

# Method → the one it shares its base with, so that most of what a history finds it finds there.
RELATIVES = {
    "norm_swap": "norm_swap_repbn",
    "linear_attention": "norm_swap_repbn",
    "watched": "magnitude",
    "guarded": "magnitude",
    "taught": "magnitude",
    "temp_scale_transition": "temp_scale",
    "iterative": "magnitude",
    "cric": "hesso",
    "pagcp": "hesso",
}


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Of relatives, what asks for the schedule; finders and the tuner, which fit several times, for one of a room."""
    if cell["history"] in ("finders", "tuned") and cell["method"] not in ("norm_swap_repbn", "temp_scale", "hesso"):
        return True
    return cell["method"] in RELATIVES and cell["history"] not in ("longer", "second_model", "validated_then_fit")


@pytest.mark.parametrize(("method", "history"), CELLS)
def test_history(method: str, history: str) -> None:
    make, net, folds = METHODS[method]
    modules = {"plain": partial(GridClassifier, net)} if net == "grid" else variants(net)
    # Forked processes hand plain weights to their parent, and these norms are none until they are exported;
    # `test_prepbn_ddp.py` has two processes that are not forked.
    refused = {} if folds else {"more_devices": f"{'linear_attention' if net == 'grid' else 'norm_swap'} does not fold"}
    options: dict[str, Any] = {"folds": folds, "scenarios": [history], "refused": refused}
    outcome = assert_method_contract(make, modules, data, **options)[history]
    assert outcome == "passed" or (history in refused and outcome.startswith("refused"))
