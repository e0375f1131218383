"""Ways of writing a network that strangers came with: each was refused, wrong or a crash at first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.slim import apply_slim
from tests.slim_models import lively
from tests.unit.test_structured_layers import check


class ByKey(nn.Module):
    """A layer for each kind of input, taken by its name."""

    def __init__(self, kind: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 8), nn.ReLU())
        self.parts, self.out = nn.ModuleDict({"young": kind(8), "old": kind(8)}), nn.Linear(8, 2)

    def forward(self, x: Tensor, key: str = "young") -> Tensor:
        return self.out(self.parts[key](self.body(x)))


@pytest.mark.parametrize("kind", [lambda n: nn.Linear(n, n), nn.BatchNorm1d], ids=["layers", "norms"])
def test_what_a_layer_of_another_key_may_read_stays(kind: Callable[[int], nn.Module]) -> None:
    model = ByKey(kind)
    groups = find_groups(model, torch.randn(4, 5))
    assert list(groups.found) == ["body.0"]
    assert "'parts.old' did not run on the example" in groups.refused["body.2"]
    apply_slim(model, {"body.0": [1, 4]}, groups)
    assert model(torch.randn(4, 5), "old").shape == (4, 2)


@pytest.mark.parametrize("kind", [lambda n: nn.Linear(n, n), nn.BatchNorm1d], ids=["layers", "norms"])
def test_an_example_may_call_the_model_in_several_ways(kind: Callable[[int], nn.Module]) -> None:
    model, x = lively(ByKey(kind)).double().eval(), torch.randn(4, 5).double()
    groups = find_groups(model, lambda: [model(x, "young"), model(x=x, key="old")])
    assert {"body.0", "body.2"} <= set(groups.found)
    for key in ("young", "old"):
        check(_With(model, key), x, _renamed(groups))


class _With(nn.Module):
    """A model with the rest of its arguments."""

    def __init__(self, model: nn.Module, *args: Any) -> None:
        super().__init__()
        self.model, self.args = model, args

    def forward(self, x: Tensor) -> Any:
        return self.model(x, *self.args)


def _renamed(groups: Groups) -> Groups:
    """The same groups of a model that is inside another."""
    found = {}
    for name, group in groups.found.items():
        slices = tuple(replace(part, name=f"model.{part.name}") for part in group.slices)
        found[name] = replace(group, slices=slices)
    return Groups(found)


class Padded(nn.Module):
    """Zeros in front of what a causal convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv1d(5, 6, 1), nn.Conv1d(6, 2, 1)
        self.layers = nn.ModuleList(nn.Conv1d(6, 6, 2, dilation=d) for d in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(1, 2))
        for layer in self.layers:
            x = x + layer(F.pad(x, (layer.dilation[0], 0))).relu()
        return self.out(x)


class Turning(nn.Module):
    """Rotary positions as products of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first, self.out = 3, nn.Linear(5, 7), nn.Linear(12, 2)
        self.q, self.k, self.v = (nn.Linear(7, 12) for _ in range(3))
        self.register_buffer(
            "turns", torch.polar(torch.ones(4, 2), torch.outer(torch.arange(4.0), torch.tensor([1, 0.1])))
        )

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[:, None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(self.first(x)).unflatten(-1, (self.heads, 4)) for layer in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self._turned(q), self._turned(k), v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Warped(nn.Module):
    """Features sampled at places that a network gives; as many channels as rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 1)
        self.place = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.place(x).permute(0, 2, 3, 1).tanh()
        return self.out(self.second(F.grid_sample(self.first(x), grid, align_corners=False)).relu())


class Sized(nn.Module):
    """A layer that goes by sizes of its own, as those of torch are called."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x, x.sin()], -1).view(-1, self.in_features * 2)
        return F.linear(both, self.weight.view(self.out_features, -1)).view(*x.shape[:-1], self.out_features)


class Sliced(nn.Module):
    """Halves of what came in, counted where they are taken, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList([nn.Linear(5, 12), nn.Linear(12, 12)])
        self.deep, self.out = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        for wide, deep in zip(self.wide, self.deep, strict=True):
            x = wide(x).relu()
            middle = x.shape[-1] // 2
            x = torch.cat([deep(x[..., :middle]), x[..., middle:]], -1)
        return self.out(x)


class OneCount(nn.Module):
    """Two attentions whose heads are counted by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 3
        self.one, self.other = (nn.ModuleList(nn.Linear(5, 12) for _ in range(3)) for _ in range(2))
        self.back, self.out = nn.Linear(12, 5), nn.Linear(12, 2)

    def _attend(self, x: Tensor, layers: nn.ModuleList) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.parts, -1).transpose(1, 2) for layer in layers)
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._attend(x + self.back(self._attend(x, self.one)), self.other))


class BothWays(nn.Module):
    """A weight that reads what it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(9, 5)), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight, self.shift).relu(), self.weight.T)


class Written(nn.Module):
    """Steps of a loop, written one by one into a tensor for all of them; channels, likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.beside, self.out = nn.GRUCell(5, 6), nn.Linear(5, 3), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, width = x.new_zeros(len(x), self.cell.hidden_size), self.cell.hidden_size
        y = x.new_zeros(*x.shape[:2], width + self.beside.out_features)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
            y[:, step, :width] = h
        y[..., width:] = self.beside(x)
        return self.out(y.relu())


class Ragged(nn.Module):
    """Sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 4]), batch_first=True, enforce_sorted=False)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Summed(nn.Module):
    """Queries and keys that are multiplied and summed by hand, over the width that came in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 2)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        *ends, width = x.shape
        q, k, v = (layer(x).view(*ends, width, 1) for layer in (self.q, self.k, self.v))
        weight = (q[:, :, None] * k[:, None]).sum(-2).softmax(2)
        return self.out((weight * v.squeeze(-1)[:, None]).sum(2) + x)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8).double()


def sequences() -> Tensor:
    return torch.randn(2, 4, 5).double()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, int]]] = {
    "padding in front": (Padded, sequences, {"first": 6}),
    "complex": (Turning, sequences, {"first": 7, "q": 3}),
    "sampled": (Warped, images, {"first": 8, "second": 5}),
    "sizes of its own": (lambda: nn.Sequential(Sized(5, 6), nn.Tanh(), nn.Linear(6, 2)), sequences, {"0": 6}),
    "halves by size": (Sliced, sequences, {"wide.0": 6, "deep.0": 6, "wide.1": 6, "deep.1": 6}),
    "heads of one count": (OneCount, sequences, {"one": 3}),
    "written in parts": (Written, sequences, {"cell": 6, "beside": 3}),
    "ragged": (Ragged, sequences, {"rnn": 6}),
    "summed by hand": (Summed, sequences, {"q": 6}),
    "used both ways": (BothWays, sequences, {"weight": 9}),
}


@pytest.mark.parametrize("name", CASES)
def test_widths_are_found_and_cut_alike(name: str) -> None:
    build, example, expected = CASES[name]
    model, x = lively(build()).double().eval(), example()
    groups = find_groups(model, x)
    assert {n: g.units for n, g in groups.found.items()} == expected, groups.report()
    check(model, x, groups)


class Rounded(nn.Conv2d):
    """A convolution whose weights are rounded, with a scale for each channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.register_buffer("scale", torch.full((outputs,), 0.05))
        self.register_buffer("zero_point", torch.zeros(outputs, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.scale.float(), self.zero_point
        weight = torch.fake_quantize_per_channel_affine(self.weight.float(), scale, zero, 0, -128, 127)
        return F.conv2d(x, weight.to(x.dtype), self.bias)


def test_vectors_beside_a_weight_go_along() -> None:
    model = nn.Sequential(Rounded(3, 8), nn.ReLU(), Rounded(8, 2)).eval()
    groups = find_groups(model, x := torch.randn(2, 3, 8, 8))
    assert list(groups.found) == ["0"]
    groups.found["0"].zero(dict(model.named_parameters()), [0, 2, 3, 4, 7])
    expected = model(x)
    apply_slim(model, {"0": [1, 5, 6]}, groups)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    assert model[0].zero_point.shape == (3,)


def test_a_scripted_part_keeps_its_widths_and_ends_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning | FutureWarning)
        part = torch.jit.script(nn.Sequential(nn.Linear(6, 7), nn.Tanh()))
    model = nn.Sequential(nn.Linear(5, 6), part, nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2))
    groups = find_groups(model, torch.randn(3, 5))
    assert list(groups.found) == ["2"]
    assert "scripted" in groups.refused["0"]


def test_a_loss_over_features_is_a_reason() -> None:
    class Compared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.one(x)
            return self.out(y), F.smooth_l1_loss(y, self.other(x))

    with pytest.raises(NoMatchError, match="smooth_l1_loss"):
        find_groups(Compared(), torch.randn(3, 5))
