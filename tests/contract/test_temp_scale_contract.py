"""The battery for TempScale, alone and together with the methods it shares weights with."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants

from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.callbacks.temp_scale import TempScale
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.testing import SCENARIOS, assert_method_contract


def with_sigma() -> tuple[EfficientCallback, ...]:
    return TempScale(tau=0.7), SigmaReparam()


CASES: dict[str, tuple[str, Any]] = {
    "constant-vit": ("timm_vit", partial(TempScale, tau=0.7)),
    "learned-encoder": ("encoder", partial(TempScale, tau=0.7, learnable=True)),
    "per-head-bert": ("bert", partial(TempScale, learnable=True, per_head=True)),
    "transition-decoder": ("decoder", partial(TempScale, tau=0.5, transition=4)),
    "with-sigma-llama": ("llama", with_sigma),
}


# Processes are slow to start: once for a constant, once for a learned temperature.
CELLS = [(c, s) for c in CASES for s in SCENARIOS if s not in ("ddp", "ddp_spawn") or c in tuple(CASES)[:2]]


# What no weight can scale: a forward adapter, beside an attention that a weight scales.
ADAPTED: dict[str, Any] = {
    "constant": partial(TempScale, tau=0.6),
    "per-head": partial(TempScale, tau=0.6, learnable=True, per_head=True),
    "transition": partial(TempScale, tau=0.5, transition=4),
    "ssmax": partial(TempScale, mode="ssmax", learnable=True),
}
REFUSED = {
    "plain": "no weights hold the attention temperature",  # the export, after everything else in the scenario
    "ddp": "would take over the weights alone",
    "ddp_spawn": "would take over the weights alone",
}


ADAPTED_CELLS = [("per-head", scenario) for scenario in SCENARIOS] + [
    ("constant", "plain"), ("constant", "compile"), ("transition", "accumulation"), ("transition", "resume"),
    ("ssmax", "plain"), ("ssmax", "resume"),
]  # fmt: skip


PARAMETER = (
    "accumulation", "clipping", "bf16_true", "manual", "prebuilt_optimizer", "configure_model", "fit_twice_then_test",
    "ddp",
)  # fmt: skip


def tail(test: str, cell: dict[str, Any]) -> bool:
    """A temperature that is learned is one more parameter for whatever handles parameters."""
    case, scenario = cell["case"], cell["scenario"]
    if test == "test_contract_of_adapters":
        return (case, scenario) in (("per-head", "ddp_spawn"), ("constant", "compile"))
    if scenario == "ddp_spawn":  # what they are sent: test_pickled_callbacks.py
        return True
    return rare(scenario, case == "constant-vit", PARAMETER if case == "learned-encoder" else ())


@pytest.mark.parametrize(("case", "scenario"), ADAPTED_CELLS)
def test_contract_of_adapters(case: str, scenario: str) -> None:
    refused = {name: REFUSED[name] for name in [scenario] if name in REFUSED}
    options: dict[str, Any] = {"folds": False, "scenarios": [scenario], "refused": refused}
    table = assert_method_contract(ADAPTED[case], variants("capped"), data, **options)
    assert table[scenario].startswith("refused" if refused else "passed")


@pytest.mark.parametrize(("case", "scenario"), CELLS)
def test_contract(case: str, scenario: str) -> None:
    net, make = CASES[case]
    table = assert_method_contract(make, variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}
