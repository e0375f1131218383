"""Attention temperatures that a file says: one sound law a module, or an error that names it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.attention.adapter import install, installed, set_laws, take_laws
from lightning_efficient.attention.temper import Law
from lightning_efficient.common.schema import SchemaError


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("tau", [-1.0, 0.0, math.nan, math.inf])
def test_no_law_is_made_of_such_a_temperature(tau: float) -> None:
    with pytest.raises(ValueError, match="`tau` of attention's temperature is a finite number above 0; got"):
        Law(tau)
    with pytest.raises(ValueError, match=r"`length` .* above 1"):
        Law(1.0, "log_n", length=tau)


LAWS = [Law(0.7), Law(1.4, "log_n", 9.0), Law(2.0, "ssmax"), Law(log_tau=nn.Parameter(torch.tensor([0.1, -0.2])))]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_comes_back_from_a_state_dict(law: Law) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    install(model, model[1], law, saved=True)
    state = model.state_dict()
    found = take_laws(state)
    assert found == {"1": law}
    assert not any("temp_scale" in key for key in state)
    other = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    set_laws(other, found)
    assert installed(other[1]).law == law


WRONG = {
    "negative": ({"constant.tau": double(-1)}, "above 0"),
    "not a number": ({"constant.tau": double(math.nan)}, "finite"),
    "infinite": ({"ssmax.tau": double(math.inf)}, "finite"),
    "a vector": ({"constant.tau": torch.ones(2)}, r"shape \(\)"),
    "a whole number": ({"constant.tau": torch.tensor(2)}, "floating"),
    "no tensor": ({"constant.tau": "x"}, "floating tensor"),
    "no temperature": ({"log_n.length": double(9)}, "'tau'.*there"),
    "no length": ({"log_n.tau": double(1)}, "'length'.*there"),
    "a length of 1": ({"log_n.tau": double(1), "log_n.length": double(1)}, "above 1"),
    "a length too many": ({"constant.tau": double(1), "constant.length": double(9)}, "a known field"),
    "two": ({"constant.tau": double(2), "ssmax.tau": double(2)}, "a known field: 'constant'; got 'ssmax'"),
    "both kinds": ({"constant.tau": double(2), "constant.log_tau": torch.zeros(1)}, "a known field"),
    "a scalar that moves": ({"constant.log_tau": torch.zeros(())}, "1 axes"),
    "none that moves": ({"constant.log_tau": torch.zeros(0)}, "one for all heads"),
    "far away": ({"constant.log_tau": torch.tensor([90.0])}, "up to 20"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_law_is_named(name: str) -> None:
    tensors, said = WRONG[name]
    with pytest.raises(SchemaError, match=f"attention temperature of 'blocks.0.attn' in the file.*{said}"):
        take_laws({f"blocks.0.attn.temp_scale.{key}": value for key, value in tensors.items()})


@pytest.mark.parametrize("value", [torch.tensor([math.nan, 0]), torch.zeros(3), torch.zeros(1), None])
def test_a_plain_load_checks_them_too(value: Tensor | None) -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    install(model, model[0], Law(log_tau=nn.Parameter(torch.zeros(2))), saved=True)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"temperature 0\.temp_scale should be"):
        model.load_state_dict(state | {"0.temp_scale.constant.log_tau": value})
