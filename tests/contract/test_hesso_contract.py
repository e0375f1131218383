"""The battery for HESSO: alone, and beside SigmaReparam or PRepBN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants

from lightning_efficient.callbacks.hesso_pruning import HESSOPruning
from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.testing import SCENARIOS, assert_method_contract

# Runs of six steps, which are cut in the middle: one portion is gone by then, and one half way.
HESSO = partial(HESSOPruning, start=0.2, duration=0.6, periods=2)
SLOW = ("ddp", "ddp_spawn")
NETS = ("timm_vit", "encoder", "cnn")
CELLS = [(n, s) for n in NETS for s in SCENARIOS if s not in SLOW or n in ("timm_vit", "cnn")]


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Of two callbacks, where each of them takes its turn."""
    also = {"sigma, hesso": ("ema_before", "ddp"), "hesso, sigma": ("compile",)}
    if cell["scenario"] == "ddp_spawn":  # what they are sent: test_pickled_callbacks.py
        return True
    if test == "test_contract" and cell["net"] == "timm_vit":  # resumed beside SigmaReparam
        return cell["scenario"] != "plain"
    head = test == "test_contract" and cell["net"] == "cnn"
    return rare(cell["scenario"], head, also.get(cell.get("methods", ""), ()))


@pytest.mark.parametrize(("net", "scenario"), CELLS)
def test_contract(net: str, scenario: str) -> None:
    assert assert_method_contract(HESSO, variants(net), data, scenarios=[scenario]) == {scenario: "passed"}


WITH_SIGMA: dict[str, Callable[[], Any]] = {
    "sigma, hesso": lambda: (SigmaReparam(), HESSO()),
    "hesso, sigma": lambda: (HESSO(), SigmaReparam()),
}


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s not in ("ddp_spawn", "swa", "copy_and_pickle")])
@pytest.mark.parametrize(("methods", "net"), [("sigma, hesso", "timm_vit"), ("hesso, sigma", "cnn")])
def test_contract_with_sigma_reparam(methods: str, net: str, scenario: str) -> None:
    table = assert_method_contract(WITH_SIGMA[methods], variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}


@pytest.mark.parametrize("scenario", ["plain", "resume", "accumulation", "ema_after", "bf16_mixed", "weights_only"])
def test_contract_with_norm_swap(scenario: str) -> None:
    """Dynamic tanh, as batch statistics make no two ways of batching equal."""

    def make() -> Any:
        return PRepBN(target="dyt", transition=3, hold=1), HESSO()

    options: dict[str, Any] = {"folds": False, "more_graphs": 2, "scenarios": [scenario]}
    table = assert_method_contract(make, variants("timm_vit"), data, **options)
    assert table == {scenario: "passed"}
