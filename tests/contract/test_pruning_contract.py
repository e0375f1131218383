"""The battery for pruning with masks: alone, and on weights that SigmaReparam or PRepBN work on too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from test_contract import data, variants
from zoo import NETS

from lightning_efficient.callbacks.magnitude_pruning import MagnitudePruning
from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.callbacks.sap_pruning import SAPPruning
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
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
CELLS = [(m, n, s) for m, n in PAIRS for s in SCENARIOS if s not in SLOW or n in ("timm_vit", "cnn")]


@pytest.mark.parametrize(("method", "net", "scenario"), CELLS)
def test_contract(method: str, net: str, scenario: str) -> None:
    table = assert_method_contract(METHODS[method], variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s != "ddp_spawn"])
@pytest.mark.parametrize(("methods", "net"), list(zip(WITH_SIGMA, ("timm_vit", "cnn", "timm_vit"), strict=True)))
def test_contract_with_sigma_reparam(methods: str, net: str, scenario: str) -> None:
    table = assert_method_contract(WITH_SIGMA[methods], variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}


@pytest.mark.parametrize(
    "scenario", [s for s in SCENARIOS if s not in ("manual", "prebuilt_optimizer", "ddp", "ddp_spawn", "ema_before")]
)
def test_contract_with_norm_swap(scenario: str) -> None:
    """Dynamic tanh, as batch statistics make no two ways of batching equal; several processes refuse PRepBN."""

    def make() -> Any:
        return PRepBN(target="dyt", transition=3, hold=1), MAGNITUDE()

    options: dict[str, Any] = {"folds": False, "more_graphs": 2, "scenarios": [scenario]}
    table = assert_method_contract(make, variants("timm_vit"), data, **options)
    assert table == {scenario: "passed"}
