"""Which models are causal, by what they do: a table of models that are and models that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_models import CAUSAL, OTHERS, Maker
from torch import nn

from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.causal import causal_norms
from lightning_efficient.norms.swap import apply_norm_swap


def swapped(make: Maker) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, inputs = make()
    apply_norm_swap(model)
    return model, inputs, lambda given: model(**given) if isinstance(given, dict) else model(*given)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_found(name: str) -> None:
    model, inputs, run = swapped(CAUSAL[name])
    found = causal_norms(model, run, inputs)
    expected = [n for n in blend_norms(model) if "encoder" not in n or name != "T5"]
    assert list(found) and sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_not(name: str) -> None:
    model, inputs, run = swapped(OTHERS[name])
    assert causal_norms(model, run, inputs) == {}
