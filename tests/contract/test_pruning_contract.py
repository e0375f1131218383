"""The battery for pruning with masks: alone, and where SigmaReparam, PRepBN or TempScale work too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants
from zoo import NETS

from lightning_efficient.callbacks.magnitude_pruning import MagnitudePruning
from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.callbacks.sap_pruning import SAPPruning
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.callbacks.temp_scale import TempScale
from lightning_efficient.testing import SCENARIOS, assert_method_contract

# Something is pruned before the middle of six steps, where runs are cut, and something after it.
MAGNITUDE = partial(MagnitudePruning, start=1, length=3, every=1)
SAP = partial(SAPPruning, p=1.0, q=2.0, iterations=2, scope="layer")
METHODS: dict[str, Callable[[], Any]] = {
    "magnitude_pruning": MAGNITUDE,
    "sap_pruning": SAP,
}
WITH_SIGMA: dict[str, Callable[[], Any]] = {
    "sigma, magnitude": lambda: (SigmaReparam(), MAGNITUDE()),
    "magnitude, sigma": lambda: (MAGNITUDE(), SigmaReparam()),
    "sap, sigma": lambda: (SAP(), SigmaReparam()),
}


# Every way of writing weights for one of them, as the rest of the machinery is shared; processes are slow to start.
PAIRS = [("magnitude_pruning", net) for net in NETS] + [("sap_pruning", net) for net in ("timm_vit", "cnn")]
SLOW = ("ddp", "ddp_spawn")
# SAP refuses `StochasticWeightAveraging` by name: test_strategies.py.
SAPS = [s for s in SCENARIOS if s != "swa"]
CELLS = [
    (m, n, s)
    for m, n in PAIRS
    for s in (SAPS if m == "sap_pruning" else SCENARIOS)
    if s not in SLOW or n in ("timm_vit", "cnn")
]


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Of two callbacks, where each of them takes its turn."""
    scenario, method = cell["scenario"], cell.get("methods") or cell["method"]
    if test == "test_contract":
        if scenario == "ddp_spawn":  # what they are sent: test_pickled_callbacks.py
            return True
        if scenario == "compile" and method == "magnitude_pruning":  # compiled beside SigmaReparam, below
            return True
        return rare(scenario, (method, cell["net"]) in (("magnitude_pruning", "timm_vit"), ("sap_pruning", "cnn")))
    also = {"sigma, magnitude": ("ema_before", "ddp"), "magnitude, sigma": ("compile",)}
    return rare(scenario, False, also.get(method, ()))


@pytest.mark.parametrize(("method", "net", "scenario"), CELLS)
def test_contract(method: str, net: str, scenario: str) -> None:
    table = assert_method_contract(METHODS[method], variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}


@pytest.mark.parametrize(
    ("methods", "net", "scenario"),
    [
        (methods, net, s)
        for methods, net in zip(WITH_SIGMA, ("timm_vit", "cnn", "timm_vit"), strict=True)
        for s in (SAPS if methods == "sap, sigma" else SCENARIOS)
        if s != "ddp_spawn"
    ],
)
def test_contract_with_sigma_reparam(methods: str, net: str, scenario: str) -> None:
    table = assert_method_contract(WITH_SIGMA[methods], variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}


WITH_NORM_SWAP = [
    *(
        ("magnitude", s)
        for s in SCENARIOS
        if s not in ("manual", "prebuilt_optimizer", "ddp", "ddp_spawn", "ema_before")
    ),
    *(("sap", s) for s in ("plain", "checkpointing", "ema_after", "resume", "fit_twice_then_test", "weights_only")),
]


@pytest.mark.parametrize(("method", "scenario"), WITH_NORM_SWAP)
def test_contract_with_norm_swap(method: str, scenario: str) -> None:
    """Dynamic tanh, as batch statistics make no two ways of batching equal; several processes refuse PRepBN."""

    def make() -> Any:
        return PRepBN(target="dyt", transition=3, hold=1), MAGNITUDE() if method == "magnitude" else SAP()

    options: dict[str, Any] = {"folds": False, "more_graphs": 2, "scenarios": [scenario]}
    table = assert_method_contract(make, variants("timm_vit"), data, **options)
    assert table == {scenario: "passed"}


@pytest.mark.parametrize(
    "scenario", ["plain", "accumulation", "compile", "ema_before", "manual", "ddp", "resume", "weights_only"]
)
@pytest.mark.parametrize("method", ["magnitude", "sap"])
def test_contract_with_temp_scale(method: str, scenario: str) -> None:
    """The temperature scales rows of a weight whose zeros it leaves zero."""

    def make() -> Any:
        return TempScale(tau=0.8, learnable=True), MAGNITUDE() if method == "magnitude" else SAP()

    table = assert_method_contract(make, variants("timm_vit"), data, scenarios=[scenario])
    assert table == {scenario: "passed"}
