"""What a training that diverged leaves behind is refused by name; infinities that are meant are not. Two NaN differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient import export, save_exported
from lightning_efficient.common.comparing import ExportError, difference, gap, largest_gap
from lightning_efficient.deploy.semi_structured import to_semi_structured
from lightning_efficient.functional import apply_temp_scale
from lightning_efficient.testing.checks import assert_close

NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """A convolution with batch norm, a recurrent layer, and what the test puts between."""

    def __init__(self, last: Callable[[Tensor], Any] = lambda x: x, **buffers: Tensor) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6))
        self.rnn = nn.GRU(6, 4, batch_first=True)
        self.last = last
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.rnn(self.stem(x).mT)[0])


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def spoil(model: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = value
    return model


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rnn.weight_hh_l0", NAN, "1 NaN of 48"),
        ("rnn.bias_ih_l0", INF, "1 infinite of 12"),
        ("stem.0.weight", -INF, "1 infinite of 54"),
        ("stem.1.running_mean", NAN, "1 NaN of 6"),
        ("stem.1.running_var", INF, "1 infinite of 6"),  # the outputs are finite, and do not depend on the input
        ("table", NAN, "1 NaN of 4"),
    ],
)
def test_weights_and_statistics(name: str, value: float, said: str) -> None:
    model = spoil(Net(table=torch.zeros(4)).eval(), name, value)
    with pytest.raises(ExportError, match=rf"Net has diverged: '{name}' \({said} values\)"):
        export(model, X)


def test_many_are_counted() -> None:
    model = Net().eval()
    for parameter in model.parameters():
        parameter.data.fill_(NAN)
    with pytest.raises(ExportError, match=r"'stem\.0\.weight' .* and 5 more"):
        export(model, X)


def test_only_what_is_exported_is_looked_at() -> None:
    whole = nn.ModuleDict({"net": Net(), "teacher": spoil(nn.Linear(2, 2), "weight", NAN)}).eval()
    export(whole["net"], X)


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors", ".pt"])
def test_files(suffix: str, tmp_path: Path) -> None:
    model = spoil(nn.Linear(8, 2), "bias", NAN)
    with pytest.raises(ExportError, match="Linear has diverged: 'bias'"):
        save_exported(model, X, tmp_path / f"m{suffix}")
    assert not list(tmp_path.iterdir())


def test_compressed_weights() -> None:
    with pytest.raises(ExportError, match="Linear has diverged: 'weight'"):
        to_semi_structured(spoil(nn.Linear(8, 2), "weight", NAN), X)


# -- infinities that are meant


def causal(h: Tensor) -> Tensor:
    return h.masked_fill(torch.ones_like(h, dtype=torch.bool).tril(), -INF)


@pytest.mark.parametrize(
    "last",
    [
        causal,
        lambda h: h.masked_fill(h > 0, INF),  # distances to what is no candidate
        lambda h: (h * 400 - 400).softmax(-1).log(),  # log 0 where float64 still has a number
    ],
)
def test_infinite_outputs_by_design(last: Callable[[Tensor], Tensor]) -> None:
    model = Net(last, mask=torch.full((4, 4), -INF).triu(1), limit=torch.tensor(INF)).eval()
    y = model(X)
    assert bool(y.isinf().any())
    assert torch.equal(export(model, X)(X), y)


# -- outputs


class Grown(nn.Module):
    """Finite weights, logits beyond float32; the first output is well."""

    def __init__(self, dtype: torch.dtype, scale: float, mask: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 4, dtype=dtype), nn.Linear(4, 4, dtype=dtype)
        self.head.weight.data.fill_(scale)
        self.mask = mask

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x).square() * 1e2
        logits = self.head(h)
        return {"hidden": h, "logits": logits.masked_fill(torch.eye(4).bool()[:3], -INF) if self.mask else logits}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 3e38), (torch.float32, -3e38), (torch.bfloat16, 3e38)])
def test_outputs_beyond_their_type(dtype: torch.dtype, scale: float, mask: bool) -> None:
    x = X.reshape(2, 3, 8).to(dtype)
    with pytest.raises(
        ExportError, match=rf"diverged: its output 'logits' is infinite, since {dtype} ends at 3\.4e\+38"
    ):
        export(Grown(dtype, scale, mask), x)


@pytest.mark.parametrize("last", [lambda h: {"a": h, "b": (h - 2).log()}, lambda h: {"a": causal(h), "b": h / h * NAN}])
def test_outputs_that_are_no_numbers(last: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ExportError, match="the model itself computes NaN in output 'b'"):
        export(Net(last).eval(), X)


# -- one comparison


def test_nan_agrees_with_nothing() -> None:
    nan, one = torch.tensor([NAN, 1.0]), torch.tensor([1.0, 1.0])
    for before, after in ((nan, nan), (nan, one), (one, nan)):
        assert gap(before, after) == INF
        assert difference(before, after).absolute == INF
        assert largest_gap({"a": one, "b": before}, {"a": one, "b": after}) == INF
    assert not difference(one, nan).undefined
    assert difference({"a": one, "b": nan, "c": one}, {"a": one * INF, "b": nan, "c": one}).output == "b"
    with pytest.raises(AssertionError, match=r"'?b'? differs by inf"):
        assert_close({"a": one, "b": nan}, {"a": one + 0.1, "b": nan}, 0.2)


def test_attention_whose_results_are_no_numbers_proves_nothing() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(f(x)[:, None] for f in (self.q, self.k, self.v)))

    model, x = Attention(), X.reshape(2, 3, 8)
    with pytest.raises(ValueError, match="nothing was changed"):
        apply_temp_scale(spoil(model, "v.bias", NAN), 2.0, x)
    apply_temp_scale(spoil(model, "v.bias", 0.0), 2.0, x)


def test_gaps() -> None:
    a = torch.tensor([INF, -INF, 4.0, 0.0])
    assert gap(a, a) == 0.0
    assert gap(a, a + torch.tensor([0, 0, 1.0, 0])) == 0.25
    assert gap(a, -a) == INF
    assert gap(torch.zeros(3), torch.full((3,), 0.5)) == 0.5
    assert gap(torch.zeros(3), torch.zeros(1, 3)) == INF
    assert gap(torch.zeros(0), torch.zeros(0)) == 0.0
    assert largest_gap({"x": a}, {}) == INF
    assert largest_gap({"x": a}, {}, which=lambda name: name != "x") == 0.0
