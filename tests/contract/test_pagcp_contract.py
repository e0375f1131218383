"""The battery for PAGCP: on the models of the zoo, alone and with SigmaReparam."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants

from lightning_efficient.callbacks.pagcp_pruning import PAGCPPruning
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.testing import SCENARIOS, assert_method_contract

# A round before the middle of six steps, where runs are cut, and one after it; few trials, wide budgets.
PAGCP = partial(PAGCPPruning, budgets={"val_loss": 0.5}, start=1, rounds=2, every=2, step=0.25, most=0.5)
# What differs from net to net is which units there are; processes are slow to start.
FEW = ("plain", "rng", "resume", "bf16_true", "ema_after", "ddp", "fit_twice_then_test", "weights_only")
CELLS = [("cnn", s) for s in SCENARIOS] + [(net, s) for net in ("timm_vit", "encoder", "bert") for s in FEW]


def tail(test: str, cell: dict[str, Any]) -> bool:
    """The quickest is the head; what spawned processes are sent has test_pickled_callbacks.py."""
    net, scenario = cell.get("net"), cell["scenario"]
    if scenario == "ddp_spawn":
        return True
    return scenario != "plain" if net in ("bert", "timm_vit") else rare(scenario, net == "cnn")


# On noise a second run may find nothing that its budget allows, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:PAGCPPruning pruned nothing"),
    # Layers of different width, which no config of transformers can say.
    pytest.mark.filterwarnings("ignore:export. save_pretrained of the copy would write a model"),
]


@pytest.mark.parametrize(("net", "scenario"), CELLS)
def test_contract(net: str, scenario: str) -> None:
    table = assert_method_contract(PAGCP, variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}


@pytest.mark.parametrize("scenario", ["plain", "resume", "accumulation", "ema_before", "fit_twice_then_test"])
def test_contract_with_sigma_reparam(scenario: str) -> None:
    def make() -> Any:
        return SigmaReparam(), PAGCP()

    table = assert_method_contract(make, variants("timm_vit"), data, scenarios=[scenario])
    assert table == {scenario: "passed"}
