"""The battery on shards: every method passes, or is refused by the documented error before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from test_contract import data
from zoo import Sharded

from lightning_efficient import PRepBN
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
    "hesso_pruning": {"start": 1, "duration": 4, "periods": 2},
    "sap_pruning": {"p": 1.0, "q": 2.0, "iterations": 2},
    "temp_scale": {"tau": 0.7, "learnable": True},
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


def tail(test: str, cell: dict[str, Any]) -> bool:
    """What test_sharded.py compares with one process, on a network of its own."""
    return cell.get("method") in ("hesso_pruning", "norm_swap", "sap_pruning", "temp_scale")


def cell(make: Callable[[], Any], scenario: str, net: str = "timm_vit", refused: str | None = None) -> str:
    modules = {name: partial(Sharded, net) for name in ("plain", *SHARDED)}
    errors = {} if refused is None else {scenario: refused}
    return assert_method_contract(make, modules, data, folds=False, scenarios=[scenario], refused=errors)[scenario]


@pytest.mark.parametrize(("method", "scenario"), CELLS)
def test_contract(method: str, scenario: str) -> None:
    kind = callback_class(method)
    error = None if kind.sharded else REFUSED.format(kind.__name__)
    if error and METHODS[method].prunes == "units":
        error = f"{error}, and shard the smaller network that `export` makes"
    found = cell(partial(build_callback, method, ARGUMENTS.get(method, {})), scenario, refused=error)
    assert found.startswith("refused" if error else "passed")


@pytest.mark.forks
@pytest.mark.exhaustive  # on another network always: test_sharded.py
@pytest.mark.parametrize("target", ["repbn", "un", "affine"])
def test_norms_with_statistics(target: str) -> None:
    """Of the batches of both processes together."""
    more = {"warmup": 2, "window": 2} if target == "un" else {}
    assert cell(partial(PRepBN, target=target, transition=3, hold=1, **more), "fsdp2") == "passed"


@pytest.mark.forks
def test_a_causal_model_is_refused() -> None:
    """Which the first process finds out on the copy that it has, and all are told."""
    error = "the model is causal.*Use `target='affine'`"
    assert cell(partial(PRepBN, transition=3, hold=1), "fsdp2", "decoder", error).startswith("refused")
