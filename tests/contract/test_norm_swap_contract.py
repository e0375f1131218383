"""The battery for PRepBN: its files do not fold while the old norms are needed, so they load with our helper."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants

from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.testing import SCENARIOS, assert_method_contract

swap = partial(PRepBN, transition=3, hold=1)


def together() -> tuple[EfficientCallback, ...]:
    return swap(), SigmaReparam()


def other_way_round() -> tuple[EfficientCallback, ...]:
    return SigmaReparam(), swap()


CASES: dict[str, tuple[str, Any]] = {
    "repbn-vit": ("timm_vit", swap),
    "repbn-slab-vit": ("timm_vit", partial(swap, init="slab", hold=0, guard="rollback")),
    "repbn-encoder": ("encoder", swap),
    "repbn-bert": ("bert", partial(swap, frozen=True)),
    "affine-decoder": ("decoder", partial(swap, target="affine")),
    "affine-llama": ("llama", partial(swap, target="affine", shape="cosine")),
    "un-vit": ("timm_vit", partial(swap, target="un", warmup=4)),
    "dyt-vit": ("timm_vit", partial(swap, target="dyt")),
    "rms-bert": ("bert", partial(swap, target="rms")),
    "with-sigma-vit": ("timm_vit", together),
    "after-sigma-encoder": ("encoder", other_way_round),
}
# Statistics of the batch, or averages of what it shows, make no two ways of batching equal.
NO_STATISTICS = ("dyt", "rms")
REFUSED = {
    "ema_before": "List (PRepBN|SigmaReparam) before WeightAveraging",
    "ddp": r"norm_swap does not fold.*strategy='ddp'",
    "ddp_spawn": r"norm_swap does not fold.*strategy='ddp'",
}


def applies(case: str, scenario: str) -> bool:
    if scenario == "accumulation":
        return case.startswith(NO_STATISTICS)
    # Refused alike for all, by the strategy; test_prepbn_ddp.py has the one that works.
    return scenario not in ("ddp", "ddp_spawn") or case == "repbn-vit"


CELLS = [(case, scenario) for case in CASES for scenario in SCENARIOS if applies(case, scenario)]


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Besides, what only some norms can do, and the backward of ``un`` where it is recomputed or scaled."""
    also = {"dyt-vit": ("accumulation",), "un-vit": ("checkpointing", "bf16_mixed", "clipping")}
    if cell["scenario"] == "ddp_spawn":  # slow to start, and refused as forked ones are: test_prepbn.py
        return True
    if cell["case"] == "repbn-slab-vit":  # another start of the same norm
        return cell["scenario"] != "plain"
    return rare(cell["scenario"], cell["case"] == "repbn-vit", also.get(cell["case"], ()))


@pytest.mark.parametrize(("case", "scenario"), CELLS)
def test_contract(case: str, scenario: str) -> None:
    net, make = CASES[case]
    # One more graph for training and one for evaluation once the old norms are gone.
    options = {"folds": False, "more_graphs": 2, "scenarios": [scenario], "refused": REFUSED}
    table = assert_method_contract(make, variants(net), data, **options)
    assert table[scenario].startswith("refused" if scenario in REFUSED else "passed")
