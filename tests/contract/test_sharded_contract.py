"""The battery on shards: every method passes, or is refused by the documented error before anything has changed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from test_contract import data
from zoo import Sharded

from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import build_callback, callback_class
from lightning_efficient.testing import SHARDED, assert_method_contract

REFUSED = "{} does not support ModelParallelStrategy: it needs whole parameters on every process.*'ddp'"
# Arguments with which six steps have something of everything.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "norm_swap": {"target": "dyt", "transition": 3, "hold": 1},
    "magnitude_pruning": {"start": 1, "length": 3, "every": 1},
    "collapse_monitor": {"every_n_steps": 2},
    "collapse_guard": {"every_n_steps": 2, "max_ratio": 1e3},
    "sap_pruning": {"p": 1.0, "q": 2.0, "iterations": 2},
    "pagcp_pruning": {"budgets": {"val_loss": 0.5}},
    "representation_monitor": {"module": "net"},
    "posterior_collapse_monitor": {"mu": "net"},
    "padding_report": {"mask": "1"},
    "adaptive_gradient_modulation": {"modalities": {"image": "x", "text": "y"}},
}
# Tensor parallel where shards of both kinds matter, to weights and to what is written to them.
CELLS = [(name, "fsdp2") for name in METHODS.with_callback] + [
    (name, "tp") for name in ("sigma_reparam", "magnitude_pruning", "sap_pruning")
]


@pytest.mark.parametrize(("method", "scenario"), CELLS)
def test_contract(method: str, scenario: str) -> None:
    make = partial(build_callback, method, ARGUMENTS.get(method, {}))
    modules = {name: partial(Sharded, "timm_vit") for name in ("plain", *SHARDED)}
    kind = callback_class(method)
    refused = {} if kind.sharded else {scenario: REFUSED.format(kind.__name__)}
    options: dict[str, Any] = {"folds": False, "scenarios": [scenario], "refused": refused}
    table = assert_method_contract(make, modules, data, **options)
    assert table[scenario].startswith("refused" if refused else "passed")
