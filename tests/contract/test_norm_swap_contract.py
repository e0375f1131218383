"""The battery for PRepBN: its files do not fold while the old norms are needed, so they load with our helper."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from zoo import Classifier, Lazy, loader

from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.testing import SCENARIOS, assert_method_contract

# Batch statistics make no two ways of batching equal, nor a process's batch the whole batch.
BATCHING = {"accumulation", "ddp", "ddp_spawn"}
CASES = {
    "repbn": ("timm_vit", partial(PRepBN, transition=3, hold=1)),
    "affine": ("decoder", partial(PRepBN, target="affine", transition=3, hold=1)),
    "dyt": ("timm_vit", partial(PRepBN, target="dyt", transition=3, hold=1)),
}


def data(batches: int, size: int, dtype: torch.dtype) -> Any:
    return loader(batches, size, dtype=dtype)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s not in ("manual", "prebuilt_optimizer")])
@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, scenario: str) -> None:
    net, make = CASES[case]
    if scenario in BATCHING - {"accumulation"} or (case != "dyt" and scenario in BATCHING):
        pytest.skip("batch statistics or spawned processes: see test_prepbn.py")
    modules = {
        "plain": partial(Classifier, net),
        "configure_model": partial(Lazy, net, build="configure_model"),
        "setup": partial(Classifier, net, build="setup"),
        "checkpointing": partial(Classifier, net, checkpointing=True),
    }
    refused = {"ema_before": "List PRepBN before WeightAveraging"}
    # One more graph for training and one for evaluation once the old norms are gone.
    options = {"folds": False, "more_graphs": 2, "scenarios": [scenario], "refused": refused}
    table = assert_method_contract(make, modules, data, **options)
    assert table[scenario].startswith("refused" if scenario in refused else "passed")
