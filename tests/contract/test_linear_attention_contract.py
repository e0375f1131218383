"""The battery for SimplifiedLinearAttention: its files do not fold, so they load with our helper."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cells import rare
from grid_models import GridClassifier, GridLazy, GridManual, GridPrebuilt
from zoo import loader

from lightning_efficient.callbacks.linear_attention import SimplifiedLinearAttention
from lightning_efficient.testing import SCENARIOS, assert_method_contract

REFUSED = {"ema_before": "List SimplifiedLinearAttention before WeightAveraging"}
# The parent of spawned processes only takes over plain weights: test_linear_attention_callback.py.
SPAWNED = {"ddp", "ddp_spawn"}


def data(batches: int, size: int, dtype: torch.dtype) -> Any:
    return loader(batches, size, dtype=dtype)


def tail(test: str, cell: dict[str, Any]) -> bool:
    return rare(cell["scenario"], head=cell["net"] == "grid")


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s not in SPAWNED])
@pytest.mark.parametrize("net", ["grid", "pairs"])
def test_contract(net: str, scenario: str) -> None:
    modules = {
        "plain": partial(GridClassifier, net),
        "configure_model": partial(GridLazy, net, build="configure_model"),
        "setup": partial(GridClassifier, net, build="setup"),
        "checkpointing": partial(GridClassifier, net, checkpointing=True),
        "manual": partial(GridManual, net),
        "prebuilt_optimizer": partial(GridPrebuilt, net),
    }
    table = assert_method_contract(
        SimplifiedLinearAttention, modules, data, folds=False, scenarios=[scenario], refused=REFUSED
    )
    assert table[scenario].startswith("refused" if scenario in REFUSED else "passed")
