"""The table method × model × scenario: every cell passes or is refused with the documented error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cells import rare
from zoo import NETS, Classifier, Lazy, Manual, loader

from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.testing import SCENARIOS, assert_method_contract


class Prebuilt(Classifier):
    """Holds an optimizer that was made before any Trainer, as LightningCLI's ``optimizer:`` key does."""

    def __init__(self, net: str) -> None:
        super().__init__(net)
        self.made = super().configure_optimizers()

    def configure_optimizers(self) -> Any:
        return self.made


def variants(net: str) -> dict[str, Callable[[], Classifier]]:
    return {
        "plain": partial(Classifier, net),
        "configure_model": partial(Lazy, net, build="configure_model"),
        "setup": partial(Classifier, net, build="setup"),
        "checkpointing": partial(Classifier, net, checkpointing=True),
        "manual": partial(Manual, net),
        "prebuilt_optimizer": partial(Prebuilt, net),
    }


def data(batches: int, size: int, dtype: torch.dtype) -> Any:
    return loader(batches, size, dtype=dtype)


METHODS: dict[str, Callable[[], Any]] = {
    "sigma_reparam": SigmaReparam,
    "sigma_reparam_split": partial(SigmaReparam, qkv="split", init="one"),
    "sigma_reparam_published": partial(SigmaReparam, gain="linear", gain_lr=1.0),
}


# Spawned processes are slow to start, and what they must hand back does not depend on the net.
CELLS = [(m, n, s) for m in METHODS for n in NETS for s in SCENARIOS if s != "ddp_spawn" or n in ("timm_vit", "cnn")]


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Only where projections are fused are they split, and how the gains move is the same for every network."""
    method, net, scenario = cell["method"], cell["net"], cell["scenario"]
    if scenario == "ddp_spawn":  # what they are sent: test_pickled_callbacks.py
        return True
    if method == "sigma_reparam_published":
        return net != "encoder" or rare(scenario, False, ("clipping",))
    if method == "sigma_reparam_split" and net not in ("timm_vit", "encoder"):
        return scenario != "plain"
    compiled = ("compile",) if (method, net) == ("sigma_reparam", "cnn") else ()
    return rare(scenario, (method, net) == ("sigma_reparam", "timm_vit"), compiled)


@pytest.mark.parametrize(("method", "net", "scenario"), CELLS)
def test_contract(method: str, net: str, scenario: str) -> None:
    table = assert_method_contract(METHODS[method], variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}
