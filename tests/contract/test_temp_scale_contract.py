"""The battery for TempScale, alone and together with the methods it shares weights with."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from test_contract import data, variants

from lightning_efficient.callbacks.base import EfficientCallback
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.callbacks.temp_scale import TempScale
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


@pytest.mark.parametrize(("case", "scenario"), CELLS)
def test_contract(case: str, scenario: str) -> None:
    net, make = CASES[case]
    table = assert_method_contract(make, variants(net), data, scenarios=[scenario])
    assert table == {scenario: "passed"}
